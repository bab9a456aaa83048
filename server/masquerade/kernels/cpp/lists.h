// Lists of pruned weights: what the dense product has too much is summed by itself and taken away.
//
// An output's listed weights are added one after the other, in the list's order, wherever and for however many rows
// that is done.
#pragma once
#include <vector>

#include "job.h"

namespace {

constexpr int64_t kSoon = 16;     // listed weights by which their inputs are fetched before they are used
constexpr int64_t kAtOnce = 4;    // inputs of a row that are laid out at once
template <class T>
constexpr int64_t kLine = kCacheLine / sizeof(T);  // rows that share a list: a cache line of inputs
constexpr int kLanes = Lanes::width;
using I = Lanes::I;

// Where a row of a line is: as a vector is widened, low halves come before high ones.
template <class T>
inline int64_t place_in_line(int64_t row) {
  if constexpr (sizeof(T) == 4) return row;
  return row / (2 * kLanes) * 2 * kLanes + row % kLanes * 2 + row / kLanes % 2;
}

template <class T>
void lay_out_lines(const Job<T>& job, int64_t start, int64_t stop, T* to) {
  const T* from[kLine<T>];
  int64_t at[kLine<T>];
  for (int64_t row = start; row < stop; row++) {
    from[row - start] = job.input(row);
    at[row - start] = place_in_line<T>(row - start);
  }
  const int64_t rows = stop - start, in = job.call.in;
  if (rows < kLine<T>) std::memset(to, 0, in * kCacheLine);
  int64_t k = 0;
  for (; k + kAtOnce <= in; k += kAtOnce)
    for (int64_t row = 0; row < rows; row++) {
      T some[kAtOnce];
      std::memcpy(some, from[row] + k, sizeof some);
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; i++) to[(k + i) * kLine<T> + at[row]] = some[i];
    }
  for (; k < in; k++)
    for (int64_t row = 0; row < rows; row++) to[k * kLine<T> + at[row]] = from[row][k];
}

// A block of a list, slice by slice and step by step.
template <class T, class C>
struct Walk {
  static constexpr int parts = kSlice / kLanes;
  const C* counts;
  const uint8_t* places;
  const T* values;
  const C *columns, *end;

  Walk(const Block<T, C>& block, int64_t pruned)
      : counts(block.counts), places(block.places), values(block.values), columns(block.columns),
        end(block.columns + pruned) {}

  void pass(int64_t weights) { columns += weights, values += weights; }
  void next_slice() { counts += kSlice; }
};

// The sums of one row, [kBlock] in the places of its outputs.
template <class T, class C>
__attribute__((noinline)) void sum_row(Walk<T, C> walk, const T* x, float* sums) {
  constexpr int parts = Walk<T, C>::parts;
  for (int64_t slice = 0; slice < kBlock; slice += kSlice, walk.next_slice()) {
    F total[parts];
    I counts[parts];
    for (int part = 0; part < parts; part++) {
      total[part] = Lanes::fill(0.0f);
      counts[part] = Lanes::count(walk.counts + part * kLanes);
    }
    const int32_t steps = walk.counts[0];
    for (int32_t step = 0; step < steps; step++) {
      int64_t active = 0;
      each_of<parts>([&](auto part) __attribute__((always_inline)) {
        constexpr int at = part.value * kLanes;
        const auto more = Lanes::more(counts[part], step);
        const F input = Lanes::gather(x, walk.columns + at), value = Lanes::widen(walk.values + at);
        total[part] = Lanes::fma_where(more, value, input, total[part]);
        active += Lanes::size(more);
      });
      walk.pass(active);
    }
    for (int part = 0; part < parts; part++) Lanes::store(sums + slice + part * kLanes, total[part]);
  }
}

// The same for all rows of `lines` at once, [rows, kBlock].
template <class T, class C>
__attribute__((noinline)) void sum_lines(Walk<T, C> walk, const T* lines, int64_t rows, float* sums) {
  constexpr int parts = kLine<T> / kLanes;
  for (int64_t slice = 0; slice < kBlock; slice += kSlice, walk.next_slice()) {
    float total[kSlice][kLine<T>] = {};
    const int64_t steps = walk.counts[0];
    for (int64_t step = 0, active = kSlice; step < steps; step++) {
      while (walk.counts[active - 1] <= step) active--;
      for (int64_t lane = 0; lane < active; lane++) {
        const F value = Lanes::fill(widen(walk.values[lane]));
        const T* line = lines + walk.columns[lane] * kLine<T>;
        __builtin_prefetch(lines + *std::min(walk.columns + lane + kSoon, walk.end - 1) * kLine<T>);
        each_of<parts>([&](auto part) __attribute__((always_inline)) {
          float* at = total[lane] + part.value * kLanes;
          Lanes::store(at, Lanes::fma(value, Lanes::line<part.value>(line), Lanes::load(at)));
        });
      }
      walk.pass(active);
    }
    for (int64_t lane = 0; lane < kSlice; lane++)
      for (int64_t row = 0; row < rows; row++) sums[row * kBlock + slice + lane] = total[lane][row];
  }
}

// The product without the pruned weights, one by one: where one of them is not finite, it cannot be subtracted.
template <class T, class C>
float without(const Job<T>& job, Walk<T, C> walk, int64_t output, int64_t row) {
  int64_t lane = walk.places[output % kBlock];
  for (; lane >= kSlice; lane -= kSlice, walk.next_slice())
    for (int64_t other = 0; other < kSlice; other++) walk.pass(walk.counts[other]);
  std::vector<T> room(job.call.form == kPlain ? 0 : kTile * job.call.in);
  const T *w = job.weights(output, 0, job.call.in, room.data(), job.call.in).at, *x = job.input(row);
  float sum = 0.0f;
  int64_t step = 0;
  for (int64_t k = 0; k < job.call.in; k++) {
    if (step < walk.counts[lane] && walk.columns[lane] == k) {
      walk.pass(std::count_if(walk.counts, walk.counts + kSlice, [&](C count) { return count > step; }));
      step++;
    } else {
      sum = Lanes::fma(widen(w[k]), widen(x[k]), sum);
    }
  }
  return sum;
}

// Take a row's sums from its products.
template <class T, class C>
void take(const Job<T>& job, const Walk<T, C>& walk, float strength, int64_t row, const float* sums,
          const Stage& stage) {
  float* y = stage.of(false, row, stage.first);
  float sorted[kBlock];
  Lanes::look_up(sums, walk.places, sorted);
  const int64_t outputs = stage.last - stage.first;
  uint32_t largest = 0;
  for (int64_t i = 0; i < outputs; i++) {
    y[i] = Lanes::fma(-strength, sorted[i], y[i]);
    uint32_t bits;
    std::memcpy(&bits, y + i, sizeof bits);
    largest = std::max(largest, bits & 0x7fffffffu);
  }
  if (__builtin_expect(largest < 0x7f800000u, 1) || strength != 1.0f) return;
  for (int64_t i = 0; i < outputs; i++)
    if (!__builtin_isfinite(y[i])) y[i] = without(job, walk, stage.first + i, row);
}

// Take what a list has of the stage's outputs, which are a block, from its rows; `sums` has room for kLine of them.
template <class T, class C>
void subtract(const Job<T>& job, const Listed<T>& listed, const Stage& stage, float* sums) {
  const List<T, C> list(listed.group->part.data, job.call.out);
  const int64_t block = stage.first / kBlock;
  const Walk<T, C> walk(list[block], list.entries[block].pruned);
  const float strength = listed.group->strength;
  if (listed.lines) sum_lines(walk, listed.lines, listed.stop - listed.start, sums);
  for (int64_t row = listed.start; row < listed.stop; row++) {
    float* its = listed.lines ? sums + (row - listed.start) * kBlock : sums;
    if (!listed.lines) sum_row(walk, job.input(row), its);
    take(job, walk, strength, row, its, stage);
  }
}

// Work with some lists in their own types.
template <class T, class Work>
void with_lists(const Listed<T>* listed, const Listed<T>* end, const Work& work) {
  for (; listed < end; listed++)
    listed->group->part.kind == kList16 ? work(*listed, uint16_t{}) : work(*listed, uint32_t{});
}

// Have what some lists have of a stage's outputs come nearer: from memory, or (`at_once`) into the first cache.
template <bool at_once, class T>
void fetch_lists(const Job<T>& job, const Stage& stage, const Listed<T>* lists, const Listed<T>* end) {
  const int64_t block = stage.first / kBlock;
  const Listed<T>* last = job.listed.end();
  with_lists(lists, std::min(end, last), [&](const Listed<T>& one, auto column) {
    const List<T, decltype(column)> list(one.group->part.data, job.call.out);
    const char* at = list.data(block);
    for (const char* end = at + list.size(block); at < end; at += kCacheLine) __builtin_prefetch(at, 0, at_once ? 3 : 2);
    asm volatile("");  // GCC takes a function that only fetches for one that does nothing
  });
}

}  // namespace
