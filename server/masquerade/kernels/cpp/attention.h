// Causal attention of chunks of consecutive positions, over keys and values that lie in blocks: one walk over a chunk's
// context, in which softmax runs along, kBlock positions at a time.
//
// A row's result depends on nothing but the row, as in tiles.h: it takes positions in their order, from 0 on, and sums
// have one accumulator. Threads divide the rows and heads.
#pragma once
#include <vector>

#include "direct.h"

namespace {

constexpr int kSlices = 4;  // vectors of a value that are summed at once
constexpr int kTogether = Lanes::matrix ? Lanes::matrix : Lanes::rows;  // queries whose scores are computed at once
constexpr int64_t kQueries = (Lanes::matrix ? 6 : 8) * kTogether;  // that walk together, and read the context once
constexpr int64_t kScoresAThread = 1 << 13;

// e^x for x <= 0, within 2e-7; NaN stays. Below -87 it is as good as 0, and the smallest normal number.
inline float exponential(float x) {
  constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: a sum has no fraction
  const float bounded = x < -87.0f ? -87.0f : x, shifted = bounded * 1.44269504f + rounder, power = shifted - rounder;
  const float rest = (bounded - power * 0.693359375f) + power * 2.12194440e-4f;  // of powers of 2, in two parts
  float sum = 1.9875691500e-4f;  // Cephes
  sum = Lanes::fma(sum, rest, 1.3981999507e-3f);
  sum = Lanes::fma(sum, rest, 8.3334519073e-3f);
  sum = Lanes::fma(sum, rest, 4.1665795894e-2f);
  sum = Lanes::fma(sum, rest, 1.6666665459e-1f);
  sum = Lanes::fma(sum, rest, 5.0000001201e-1f);
  sum = Lanes::fma(sum, rest * rest, rest) + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const uint32_t raised = static_cast<uint32_t>(bits - 0x4b400000 + 127) << 23;
  float scale;
  std::memcpy(&scale, &raised, sizeof scale);
  return sum * scale;
}

// Whether walks of many queries first make fp32 of keys and values: where that is what is multiplied.
template <class T>
constexpr bool kWidens = std::is_same_v<T, T16> && std::is_same_v<Input<T>, float>;

// `count` elements of keys in the order of `lay_out`, and of values as they are; whole steps.
template <class T>
void widen_block(const T* keys, const T* values, int64_t count, float* wide_keys, float* wide_values) {
  for (int64_t k = 0; k < count; k += kStep<T>)
    each_of<Lanes::parts<T>>([&](auto part) __attribute__((always_inline)) {
      const int64_t at = k + part.value * Lanes::width;
      const auto raw = Lanes::read<part.value>(keys + k);
      Lanes::store(wide_keys + at, Lanes::effective<Mode::dense, part.value>(raw, nullptr, F{}));
      Lanes::store(wide_values + at, Lanes::widen(values + at));
    });
}

// Query heads of a chunk's rows that share keys and values, up to kTogether of them, and what softmax has come to.
template <class T>
struct Queries {
  Inputs<T> inputs;
  int count;
  float* sums;                  // [count, size]
  int64_t length[kTogether];  // positions that a query attends to: the first ones
  float largest[kTogether], mass[kTogether];

  int64_t longest() const { return length[count - 1]; }
};

// The products of some queries and the first `positions` of a block, whose keys begin at `keys`; `fetched` bytes of its
// values come nearer meanwhile.
template <class T, class K>
void score(const Queries<T>& queries, const K* keys, const K* values, int64_t size, int64_t positions, int64_t fetched,
           float* scores) {
  const Inputs<K> inputs{queries.inputs.x, queries.inputs.stride};
  const Pass pass{Mode::dense, false, false, queries.count, 0, {1.0f}, {nullptr}};
  Ahead ahead(values, fetched, (positions + kTile - 1) / kTile * std::max(int64_t{1}, size / kStep<K>));
  for (int64_t at = 0; at < positions; at += kTile) {  // a tile beyond the last position has scores that nobody reads
    const Place<K> place{keys + at * size, size, 0, 0};
    const Reach reach{0, size, true, true, nullptr, scores + at};
    direct_rows<K, Mode::dense, false>(inputs, pass, place, reach, ahead);
  }
}

// Turns the scores of the positions from `first` on into weights, relative to the largest score so far, to which the sums
// are brought, too. Positions beyond a query's length have no weight.
template <class T>
void weigh(Queries<T>& queries, float scale, int64_t first, int64_t size, float* scores) {
  for (int r = 0; r < queries.count; r++) {
    float *weights = scores + r * kRow, *sums = queries.sums + r * size, largest = queries.largest[r];
    const int64_t own = std::clamp(queries.length[r] - first, int64_t{0}, kBlock);
    std::fill(weights + own, weights + kBlock, -__builtin_inff());
    for (int64_t i = 0; i < kBlock; i++) weights[i] *= scale;
    F most = Lanes::fill(largest), total = Lanes::fill(0.0f);
    for (int64_t i = 0; i < kBlock; i += Lanes::width) most = Lanes::larger(Lanes::load(weights + i), most);
    largest = Lanes::largest(most);
    for (int64_t i = 0; i < kBlock; i++) weights[i] = exponential(weights[i] - largest);
    std::fill(weights + own, weights + kBlock, 0.0f);
    for (int64_t i = 0; i < kBlock; i += Lanes::width) total = total + Lanes::load(weights + i);
    const float before = exponential(queries.largest[r] - largest);
    queries.mass[r] = queries.mass[r] * before + Lanes::sum(total);
    queries.largest[r] = largest;
    for (int64_t i = 0; i < size; i++) sums[i] *= before;
  }
}

// Adds the values of some positions of a block to the sums of `n` queries, and fetches as many bytes at `next`.
template <class T, int n, int slices>
void add_slices(const T* values, int64_t size, int64_t positions, const float* weights, float* sums, const T* next) {
  F total[n][slices];
#pragma GCC unroll 8
  for (int r = 0; r < n; r++)
#pragma GCC unroll 4
    for (int s = 0; s < slices; s++) total[r][s] = Lanes::load(sums + r * size + s * Lanes::width);
  for (int64_t at = 0; at < positions; at++) {
    const T* from = values + at * size;
    constexpr int64_t bytes = slices * Lanes::width * sizeof(T);
    if (next)
      for (int64_t line = 0; line < bytes; line += kCacheLine) __builtin_prefetch(reinterpret_cast<const char*>(next + at * size) + line, 0, 2);
    F weight[n];
#pragma GCC unroll 8
    for (int r = 0; r < n; r++) weight[r] = Lanes::fill(weights[r * kRow + at]);
#pragma GCC unroll 4
    for (int s = 0; s < slices; s++) {
      const F value = Lanes::widen(from + s * Lanes::width);
#pragma GCC unroll 8
      for (int r = 0; r < n; r++) total[r][s] = Lanes::fma(weight[r], value, total[r][s]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < n; r++)
#pragma GCC unroll 4
    for (int s = 0; s < slices; s++) Lanes::store(sums + r * size + s * Lanes::width, total[r][s]);
}

template <class T, class K, int n = Lanes::rows>
void add_values(const Queries<T>& queries, const K* values, int64_t size, int64_t positions, const float* weights,
                const K* next) {
  if constexpr (n > 1)
    if (queries.count < n) return add_values<T, K, n - 1>(queries, values, size, positions, weights, next);
  int64_t at = 0;
  for (constexpr int64_t step = kSlices * Lanes::width; at + step <= size; at += step)
    add_slices<K, n, kSlices>(values + at, size, positions, weights, queries.sums + at, next ? next + at : next);
  for (; at < size; at += Lanes::width)
    add_slices<K, n, 1>(values + at, size, positions, weights, queries.sums + at, nullptr);
}

// Consecutive queries of one chunk and one head of the cache, counted row by row.
struct Share {
  int64_t chunk, head, start, stop;
};

template <class T>
class Attention {
 public:
  // `next` is what comes after, or null.
  Attention(const AttentionCall& call, const Share& share, const Share* next)
      : call_(call), share_(share), next_(next), shared_(call.heads / call.kv_heads), rows_(call.rows[share.chunk]) {}

  void run() {
    static thread_local Scratch scratch;
    const int64_t size = call_.size, queries = share_.stop - share_.start;
    const int64_t parts = (queries + Lanes::rows - 1) / Lanes::rows, stride = round_up(size, kStep<T>) + kPad<T>;
    const int64_t widened = kWidens<T> && parts > 1 && size % kStep<T> == 0 ? kBlock * size : 0;
    const int64_t floats = queries * size + Lanes::rows * kRow + 2 * widened;
    scratch.reserve(queries * stride * sizeof(Input<T>) + floats * sizeof(float) + parts * sizeof(Queries<T>), 6);
    Input<T>* x = scratch.take<Input<T>>(queries * stride);
    float *sums = scratch.take<float>(queries * size), *scores = scratch.take<float>(Lanes::rows * kRow);
    float *keys = scratch.take<float>(widened), *values = scratch.take<float>(widened);
    Queries<T>* passes = scratch.take<Queries<T>>(parts);
    for (int64_t part = 0; part < parts; part++) {
      const int64_t start = queries * part / parts, stop = queries * (part + 1) / parts;
      passes[part] = {{x + start * stride, stride}, static_cast<int>(stop - start), sums + start * size, {}, {}, {}};
      begin(passes[part], share_.start + start);
    }
    const int64_t longest = passes[parts - 1].longest();
    for (int64_t first = 0; first < longest; first += kBlock) {
      if (widened) widen(first, std::min(longest, first + kBlock), keys, values);
      for (int64_t part = 0; part < parts; part++)
        if (first >= passes[part].longest()) continue;
        else if (widened) pass_over(passes[part], first, keys, values, scores);
        else pass_over(passes[part], first, part == 0, scores);
    }
    for (int64_t part = 0; part < parts; part++) finish(passes[part], share_.start + queries * part / parts);
  }

 protected:
  // Where a query, counted row by row, is in q and y.
  int64_t place(int64_t query) const {
    const int64_t row = call_.starts[share_.chunk] + query / shared_;
    return (row * call_.heads + share_.head * shared_ + query % shared_) * call_.size;
  }
  const T* block(const void* cache, int64_t position) const { return block(share_, cache, position); }
  const T* block(const Share& share, const void* cache, int64_t position) const {
    const int64_t number = call_.blocks[share.chunk * call_.width + position / call_.positions];
    return static_cast<const T*>(cache) + (number * call_.kv_heads + share.head) * call_.positions * call_.size;
  }
  // The keys that are needed when those of a block are done: kBlock positions on, or the first ones of what comes next.
  const T* following(int64_t position, int64_t first, int64_t longest) const {
    if (position + kBlock < longest) return block(call_.keys, position + kBlock);
    const bool ends = first + kBlock >= longest && next_ && position - first < call_.lengths[next_->chunk];
    return ends ? block(*next_, call_.keys, position - first) : nullptr;
  }

  void begin(Queries<T>& queries, int64_t start) const {
    std::fill(queries.sums, queries.sums + queries.count * call_.size, 0.0f);
    for (int r = 0; r < queries.count; r++) {
      const Inputs<T>& inputs = queries.inputs;
      lay_out(static_cast<const T*>(call_.q) + place(start + r), call_.size, inputs.stride, inputs.x + r * inputs.stride);
      queries.length[r] = call_.lengths[share_.chunk] - rows_ + 1 + (start + r) / shared_;
      queries.largest[r] = -__builtin_inff();
      queries.mass[r] = 0.0f;
    }
  }

  // The positions from `first` on, up to kBlock of them; what comes next is fetched on the way, if that is to be done.
  void pass_over(Queries<T>& queries, int64_t first, bool fetches, float* scores) const {
    const int64_t stop = std::min(queries.longest(), first + kBlock), size = call_.size;
    const auto each_block = [&](const auto& work) {
      for (int64_t at = first; at < stop; at += call_.positions) work(at, std::min(call_.positions, stop - at));
    };
    each_block([&](int64_t at, int64_t count) {
      const int64_t bytes = fetches ? count * size * sizeof(T) : 0;
      score(queries, block(call_.keys, at), block(call_.values, at), size, count, bytes, scores + at - first);
    });
    weigh(queries, call_.scale, first, size, scores);
    each_block([&](int64_t at, int64_t count) {
      const T* next = fetches ? following(at, first, queries.longest()) : nullptr;
      add_values(queries, block(call_.values, at), size, count, scores + at - first, next);
    });
  }

  // The same, of keys and values that were widened.
  void pass_over(Queries<T>& queries, int64_t first, const float* keys, const float* values, float* scores) const {
    if constexpr (kWidens<T>) {
      const int64_t count = std::min(queries.longest() - first, kBlock);
      score(queries, keys, values, call_.size, count, 0, scores);
      weigh(queries, call_.scale, first, call_.size, scores);
      add_values<T, float>(queries, values, call_.size, count, scores, nullptr);
    }
  }
  void widen(int64_t first, int64_t stop, float* keys, float* values) const {
    if constexpr (kWidens<T>)
      for (int64_t at = first; at < stop; at += call_.positions) {
        const int64_t start = (at - first) * call_.size, count = call_.positions * call_.size;
        widen_block(block(call_.keys, at), block(call_.values, at), count, keys + start, values + start);
      }
  }

  void finish(const Queries<T>& queries, int64_t start) const {
    for (int r = 0; r < queries.count; r++) {
      T* y = static_cast<T*>(call_.y) + place(start + r);
      for (int64_t i = 0; i < call_.size; i++) narrow(queries.sums[r * call_.size + i] / queries.mass[r], y + i);
    }
  }

  const AttentionCall& call_;
  const Share share_;
  const Share* const next_;
  const int64_t shared_, rows_;  // query heads of a head of the cache, rows of the chunk
};

template <class T, class Walk = Attention<T>>
void attend_as(const AttentionCall& call) {
  static thread_local std::vector<Share> shares;
  shares.clear();
  int64_t scores = 0;
  for (int64_t chunk = 0; chunk < call.chunks; chunk++) {
    const int64_t queries = call.rows[chunk] * call.heads / call.kv_heads;
    scores += queries * call.kv_heads * call.lengths[chunk];
    for (int64_t head = 0; head < call.kv_heads; head++)
      for (int64_t start = 0; start < queries; start += kQueries)
        shares.push_back({chunk, head, start, std::min(start + kQueries, queries)});
  }
  const int64_t count = shares.size(), worth = std::max(int64_t{1}, scores / kScoresAThread);
  const Share* const all = shares.data();  // of this thread
  const int64_t threads = std::min({int64_t{call.threads}, worth, count});
  Shortage shortage;
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(threads)) if (threads > 1)
  for (int64_t share = 0; share < count; share++)
    shortage.watch([&] { Walk(call, all[share], share + 1 < count ? all + share + 1 : nullptr).run(); });
  shortage.report();
}

[[maybe_unused]] void attend(const AttentionCall& call) {
  if (call.dtype == kFloat32)
    attend_as<T32>(call);
  else
    attend_as<T16>(call);
}

}  // namespace
