// The masked product and attention over many small shapes against sums in double, and layers, in memory of just the right
// size: what AddressSanitizer and UndefinedBehaviorSanitizer are run on. Exits with 1 at the first wrong number.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "call.h"

#if !defined(WITH_AVX512)
void multiply_avx512(const Call&) {}
void multiply_avx512bf16(const Call&) {}
void attend_avx512(const AttentionCall&) {}
void attend_avx512bf16(const AttentionCall&) {}
RowKernels rows_avx512(int32_t) { return {}; }
#endif
#if !defined(__x86_64__)
void multiply_avx2(const Call&) {}
void attend_avx2(const AttentionCall&) {}
RowKernels rows_avx2(int32_t) { return {}; }
#endif

namespace {

std::mt19937 random_bits(7);
double uniform() { return random_bits() / 4294967296.0; }

template <class T>
T encode(float value) {
  if constexpr (sizeof(T) == 4) return value;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<T>(bits >> 16);
}
template <class T>
double decode(T value) {
  if constexpr (sizeof(T) == 4) return value;
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

struct Mask {
  std::vector<uint8_t> keep, list;
  std::vector<int32_t> offsets;
  std::vector<uint16_t> narrow;
  std::vector<uint32_t> wide;
};

Mask make_mask(int64_t out, int64_t in, double share) {
  const int64_t stride = (in + 63) / 64 * 8;
  Mask mask;
  mask.keep.assign(out * stride, 0);
  mask.offsets.assign(1, 0);
  for (int64_t o = 0; o < out; o++) {
    for (int64_t k = 0; k < in; k++) {
      if (uniform() < share) {
        mask.narrow.push_back(k);
        mask.wide.push_back(k);
      } else {
        mask.keep[o * stride + k / 8] |= 1 << k % 8;
      }
    }
    mask.offsets.push_back(mask.narrow.size());
  }
  return mask;
}

// One span of a test batch.
struct MaskedRows {
  Kind kind;
  double strength;
  int64_t rows;
};

// Lays out a list and reads it back.
template <class T>
bool check_list(Mask& mask, Kind kind, const std::vector<T>& weight, int64_t out, int64_t in) {
  const int32_t dtype = sizeof(T) == 4 ? kFloat32 : kBfloat16;
  const auto round_trip = [&](auto& columns) {
    auto found = columns;
    std::vector<int32_t> offsets(out + 1);
    mask.list.resize(masquerade_list_size(kind, dtype, out, columns.size()));
    masquerade_list_write(kind, dtype, mask.offsets.data(), columns.data(), weight.data(), out, in, mask.list.data());
    std::fill(found.begin(), found.end(), 0);
    masquerade_list_read(kind, dtype, mask.list.data(), out, offsets.data(), found.data());
    return offsets == mask.offsets && found == columns;
  };
  return kind == kList16 ? round_trip(mask.narrow) : round_trip(mask.wide);
}

template <class T>
bool check(int32_t isa, int64_t out, int64_t in, int64_t base_rows, const std::vector<MaskedRows>& groups) {
  int64_t rows = base_rows;
  for (const MaskedRows& group : groups) rows += group.rows;
  std::vector<T> weight(out * in), x(rows * in), y(rows * out), bias(out);
  for (auto* all : {&weight, &x, &bias})
    for (T& value : *all) value = encode<T>(uniform() - 0.5);
  std::vector<Mask> masks;
  std::vector<std::vector<Part>> tables;
  std::vector<Span> spans;
  std::vector<int> span_of_row(rows, -1);
  int64_t start = base_rows / 2;  // rows of the base on both sides
  for (const MaskedRows& group : groups) {
    masks.push_back(make_mask(out, in, group.kind == kBitmap ? 0.5 : uniform() < 0.5 ? 0.02 : 0.3));
    for (int64_t row = start; row < start + group.rows; row++) span_of_row[row] = spans.size();
    spans.push_back({nullptr, group.strength, start, start + group.rows});
    start += group.rows;
  }
  for (size_t m = 0; m < masks.size(); m++) {
    const Kind kind = groups[m].kind;
    if (kind != kBitmap && !check_list<T>(masks[m], kind, weight, out, in)) return false;
    std::vector<uint8_t>& data = kind == kBitmap ? masks[m].keep : masks[m].list;
    tables.push_back({Part{kNothing, nullptr}, Part{kind, data.data()}});
  }
  for (size_t m = 0; m < masks.size(); m++) spans[m].parts = tables[m].data();
  const auto run = [&](int64_t number) {
    return masquerade_product(spans.data(), spans.size(), number, weight.data(), bias.data(), x.data(), y.data(), rows, out,
                              in, sizeof(T) == 4 ? kFloat32 : kBfloat16, kPlain, isa, 2);
  };
  for (const int64_t number : {0, 1}) {
    if (run(number) != kDone) return false;
    const int64_t stride = (in + 63) / 64 * 8;
    for (int64_t row = 0; row < rows; row++)
      for (int64_t o = 0; o < out; o++) {
        const int m = number ? span_of_row[row] : -1;
        double sum = decode(bias[o]), scale = 1;
        for (int64_t k = 0; k < in; k++) {
          const bool kept = m < 0 || masks[m].keep[o * stride + k / 8] >> k % 8 & 1;
          const double term = decode(weight[o * in + k]) * decode(x[row * in + k]);
          sum += kept ? term : term * (1 - groups[m].strength);
          scale += std::fabs(term);
        }
        const double found = decode(y[row * out + o]);
        if (!(std::fabs(found - sum) <= scale * (sizeof(T) == 4 ? 1e-6 : 1e-2))) {
          std::printf("isa %d, %ld x %ld, row %ld, output %ld: %g, expected %g\n", isa, (long)out, (long)in, (long)row,
                      (long)o, found, sum);
          return false;
        }
      }
  }
  return true;
}

// Overlapping spans and spans outside the batch are refused before anything is read.
bool check_refusals() {
  const Part parts[] = {{kBitmap, nullptr}};
  const std::vector<std::vector<Span>> wrong = {
      {{parts, 1, 0, 3}}, {{parts, 1, -1, 1}}, {{parts, 1, 2, 1}}, {{parts, 1, 0, 2}, {parts, 1, 1, 2}}};
  float weight = 0, x[2] = {}, y[2];
  for (const auto& spans : wrong)
    if (masquerade_product(spans.data(), spans.size(), 0, &weight, nullptr, x, y, 2, 1, 1, kFloat32, kPlain, kPortable, 1) !=
        kNoRoute)
      return false;
  return masquerade_product(nullptr, 0, 0, &weight, nullptr, x, y, 0, 1, 1, kFloat32, kPlain, kPortable, 1) == kDone;
}

// A quantised weight has the products of its values; if inputs are rounded, a row has the same with others and alone.
bool check_quantised(int32_t isa, int32_t form, int64_t out, int64_t in, int64_t rows) {
  constexpr int64_t kBytes[] = {0, 18, 20, 22, 24, 34, 144, 176, 210};  // of a block, by form
  const int64_t inputs = form < kQ4_K ? 32 : 256;
  in = (in + inputs - 1) / inputs * inputs;
  std::vector<uint8_t> blocks(out * in / inputs * kBytes[form]), weight(masquerade_quantised_size(form, out, in));
  for (size_t i = 0; i < blocks.size(); i++) blocks[i] = i * 37 % 59;  // finite scales
  std::vector<int64_t> outputs(out);
  for (int64_t o = 0; o < out; o++) outputs[o] = o;
  std::vector<uint16_t> values(out * in), x(rows * in), y(rows * out), expected(rows * out);
  for (size_t i = 0; i < x.size(); i++) x[i] = 0x3f00 + i % 113;
  masquerade_quantised_write(form, blocks.data(), 0, out, in, weight.data());
  masquerade_quantised_read(form, weight.data(), outputs.data(), out, in, values.data());
  for (const bool plain : {false, true})
    if (masquerade_product(nullptr, 0, 0, plain ? static_cast<void*>(values.data()) : weight.data(), nullptr, x.data(),
                           plain ? expected.data() : y.data(), rows, out, in, kBfloat16, plain ? kPlain : form, isa, 2))
      return false;
  if (y != expected) return false;
  const auto round = [&](int64_t count, const uint16_t* from, uint16_t* to) {
    return masquerade_product(nullptr, 0, 0, weight.data(), nullptr, from, to, count, out, in, kBfloat16, form | kRounds, isa, 2);
  };
  if (round(rows, x.data(), y.data()) || round(1, x.data() + (rows - 1) * in, expected.data())) return false;
  return std::equal(y.end() - out, y.end(), expected.begin());
}

// Chunks of requests whose blocks are in no order, each behind the other ones' last.
template <class T>
bool check_attention(int32_t isa, int64_t heads, int64_t kv_heads, int64_t size, int64_t positions,
                     const std::vector<int32_t>& rows, const std::vector<int32_t>& lengths) {
  const int64_t chunks = rows.size();
  int64_t total = 0, width = 0, count = 0;
  std::vector<int32_t> starts;
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    starts.push_back(total);
    total += rows[chunk];
    width = std::max<int64_t>(width, (lengths[chunk] + positions - 1) / positions);
  }
  std::vector<int32_t> blocks(chunks * width, -1);
  for (int64_t chunk = chunks; chunk--;)
    for (int64_t at = 0; at * positions < lengths[chunk]; at++) blocks[chunk * width + at] = count++;
  std::vector<T> q(total * heads * size), y(q.size()), keys(count * kv_heads * positions * size), values(keys.size());
  for (auto* all : {&q, &keys, &values})
    for (T& value : *all) value = encode<T>(uniform() - 0.5);
  const float scale = 3.0f;
  if (masquerade_attention(q.data(), keys.data(), values.data(), y.data(), blocks.data(), starts.data(), rows.data(),
                           lengths.data(), chunks, heads, kv_heads, size, width, positions, scale,
                           sizeof(T) == 4 ? kFloat32 : kBfloat16, isa, 2) != kDone)
    return false;
  for (int64_t chunk = 0; chunk < chunks; chunk++)
    for (int64_t row = 0; row < rows[chunk]; row++)
      for (int64_t head = 0; head < heads; head++) {
        const int64_t length = lengths[chunk] - rows[chunk] + 1 + row, query = ((starts[chunk] + row) * heads + head) * size;
        std::vector<double> sums(size);
        double mass = 0;
        for (int64_t at = 0; at < length; at++) {
          const int64_t block = blocks[chunk * width + at / positions] * kv_heads + head / (heads / kv_heads);
          const int64_t place = (block * positions + at % positions) * size;
          double score = 0;
          for (int64_t i = 0; i < size; i++) score += decode(q[query + i]) * decode(keys[place + i]);
          const double weight = std::exp(score * scale);
          mass += weight;
          for (int64_t i = 0; i < size; i++) sums[i] += weight * decode(values[place + i]);
        }
        for (int64_t i = 0; i < size; i++)
          if (!(std::fabs(decode(y[query + i]) - sums[i] / mass) <= (sizeof(T) == 4 ? 1e-5 : 1e-2))) {
            std::printf("isa %d, attention of %ld heads of %ld, chunk %ld, row %ld\n", isa, (long)heads, (long)size,
                        (long)chunk, (long)row);
            return false;
          }
      }
  return true;
}

// Two layers in one call equal the two in two calls, where rows and outputs are enough for two threads.
template <class T>
bool check_layers(int32_t isa, int64_t rows, int64_t hidden, int64_t wide, int64_t heads, int64_t kv_heads, bool norms) {
  constexpr int64_t kSize = 16, kPositions = 4;
  const int64_t blocks = (rows + kPositions - 1) / kPositions, dtype = sizeof(T) == 4 ? kFloat32 : kBfloat16;
  std::vector<std::vector<T>> held;
  held.reserve(64);
  const auto make = [&](int64_t count) {
    held.emplace_back(count);
    for (T& value : held.back()) value = encode<T>(uniform() - 0.5);
    return held.back().data();
  };
  const auto linear = [&](int64_t out, int64_t in) { return Linear{make(out * in), make(out), out, in, kPlain, 0}; };
  std::vector<Layer> layers;
  for (const int64_t after : {0, 1}) {
    const Linear q = linear(heads * kSize, hidden), k = linear(kv_heads * kSize, hidden), v = linear(k.out, hidden);
    layers.push_back({q, k, v, linear(hidden, q.out), linear(wide, hidden), linear(wide, hidden), linear(hidden, wide),
                      make(hidden), make(hidden), norms ? make(kSize) : nullptr, norms ? make(kSize) : nullptr, dtype,
                      heads, kv_heads, kSize, after, after, 1e-6, 0.25, 0.5});
  }
  std::vector<int64_t> slots;
  std::vector<int32_t> table(blocks);
  for (int64_t block = 0; block < blocks; block++) table[block] = blocks - 1 - block;
  for (int64_t row = 0; row < rows; row++)
    for (int64_t head = 0; head < kv_heads; head++)
      slots.push_back((table[row / kPositions] * kv_heads + head) * kPositions + row % kPositions);
  const int32_t start = 0, length = rows;
  const int64_t cached = blocks * kv_heads * kPositions * kSize;
  T *keys = make(2 * cached), *values = make(2 * cached), *cos = make(rows * kSize), *sin = make(rows * kSize);
  const Step step{keys,   values, slots.data(), table.data(), &start, &length,
                  &length, 1,      blocks,       kPositions,   rows,   static_cast<int64_t>(cached * sizeof(T))};
  T *x = make(rows * hidden), *y = make(rows * hidden), *once = make(rows * hidden), *twice = make(rows * hidden);
  const auto run = [&](int64_t first, int64_t number, const T* from, T* to, int32_t threads) {
    return masquerade_layers(&layers[first], first, number, &step, nullptr, 0, cos, sin, from, to, isa, threads) == kDone;
  };
  const bool done = run(0, 2, x, y, 2) && run(0, 1, x, once, 1) && run(1, 1, once, twice, 1);
  return done && !std::memcmp(y, twice, rows * hidden * sizeof(T)) && std::isfinite(decode(y[0]));
}

// What is between products and has gradients stays within its rows, and two threads write what one does.
template <class T>
bool check_rows(int32_t isa, int64_t rows, int64_t size) {
  const int32_t dtype = sizeof(T) == 4 ? kFloat32 : kBfloat16;
  const int64_t count = rows * size;
  const auto make = [&](int64_t elements) {
    std::vector<T> made(elements);
    for (T& value : made) value = encode<T>(uniform() - 0.5);
    return made;
  };
  const std::vector<T> x = make(count), up = make(count), above = make(count), weight = make(size);
  std::vector<uint8_t> seen(count);
  for (uint8_t& one : seen) one = uniform() < 0.7;
  std::vector<std::vector<T>> found[2];
  std::vector<float> sums[2];
  for (const int32_t threads : {1, 2}) {
    std::vector<T> y(count), dx(count), gate(count), dgate(count), dup(count), shares = x, scores = above;
    masquerade_normalize(x.data(), weight.data(), y.data(), rows, size, 1e-6f, dtype, isa, threads);
    masquerade_normalize_back(x.data(), weight.data(), above.data(), dx.data(), rows, size, 1e-6f, dtype, isa, threads);
    masquerade_gate(x.data(), up.data(), gate.data(), count, dtype, isa, threads);
    masquerade_gate_back(x.data(), up.data(), above.data(), dgate.data(), dup.data(), count, dtype, isa, threads);
    masquerade_softmax(shares.data(), seen.data(), rows, 1, 1, size, 0.5f, dtype, isa, threads);
    masquerade_softmax_back(shares.data(), scores.data(), rows, size, 0.5f, dtype, isa, threads);
    sums[threads - 1].assign(count, 1.0f);
    masquerade_add_products(x.data(), up.data(), sums[threads - 1].data(), count, dtype, isa, threads);
    found[threads - 1] = {y, dx, gate, dgate, dup, shares, scores};
  }
  for (const auto& values : found[0])
    for (const T value : values)
      if (!std::isfinite(decode(value))) return false;
  return found[0] == found[1] && sums[0] == sums[1];
}

}  // namespace

int main() {
  const int64_t shapes[][2] = {{1, 1}, {3, 17}, {4, 64}, {5, 63}, {18, 130}, {33, 1040}, {260, 127}};
  const std::vector<std::vector<MaskedRows>> batches = {
      {},
      {{kBitmap, 1.0, 1}},
      {{kBitmap, 0.7, 2}, {kList16, 1.0, 1}},
      {{kList32, 0.5, 5}, {kBitmap, 1.0, 9}, {kList16, 1.0, 17}},
      {{kList16, 0.7, 30}, {kBitmap, 0.3, 25}},
  };
  if (!check_refusals()) return 1;
  for (int32_t isa = 0; isa <= kAmx; isa++) {
#if !defined(WITH_AVX512)
    if (isa >= kAvx512) continue;
#endif
    if (!(masquerade_isas() >> isa & 1)) continue;
    const int64_t heads[][2] = {{1, 1}, {6, 2}, {8, 1}};
    const int64_t blocks[][2] = {{16, 16}, {48, 64}, {80, 4}};
    for (const auto& many : heads)
      for (const auto& block : blocks)
        for (const auto& [rows, lengths] : std::vector<std::pair<std::vector<int32_t>, std::vector<int32_t>>>{
                 {{1}, {1}}, {{1, 5, 1}, {64, 70, 131}}, {{20, 3}, {20, 150}}}) {
          if (!check_attention<float>(isa, many[0], many[1], block[0], block[1], rows, lengths)) return 1;
          if (!check_attention<uint16_t>(isa, many[0], many[1], block[0], block[1], rows, lengths)) return 1;
        }
    for (const bool norms : {false, true}) {
      if (!check_layers<float>(isa, 5, 33, 17, 3, 1, norms) || !check_layers<float>(isa, 260, 32, 256, 2, 2, norms)) return 1;
      if (!check_layers<uint16_t>(isa, 260, 32, 256, 2, 2, norms)) return 1;
    }
    for (const int64_t size : {1, 15, 16, 37, 576})
      if (!check_rows<float>(isa, 130, size) || !check_rows<uint16_t>(isa, 130, size)) return 1;
    for (int32_t form = kQ4_0; form <= kQ6_K; form++)
      for (const int64_t rows : {1, 7, 26})
        if (!check_quantised(isa, form, 67, 96, rows) || !check_quantised(isa, form, 3, 2080, rows)) return 1;
    for (const auto& shape : shapes)
      for (const auto& batch : batches)
        for (int64_t base_rows : {0, 1, 26}) {
          if (base_rows == 0 && batch.empty()) continue;
          if (!check<float>(isa, shape[0], shape[1], base_rows, batch)) return 1;
          if (!check<uint16_t>(isa, shape[0], shape[1], base_rows, batch)) return 1;
        }
  }
  std::puts("ok");
  return 0;
}
