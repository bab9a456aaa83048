// Lists of pruned weights: what the dense product has too much is summed by itself and taken away.
//
// The pruned weight at place j of a list is added to sum j % kChains of its output, in the list's order, wherever and
// for however many rows that is done; the sums are then added in one fixed tree.
#pragma once
#include "job.h"

namespace {

constexpr uint64_t kChains = 4;    // sums of an output, lest each addition wait for the one before
constexpr int64_t kSoon = 16;     // listed weights by which their inputs are fetched before they are used
constexpr int64_t kIdLanes = 32;  // numbers that are written at once
constexpr int64_t kAtOnce = 4;    // inputs of a row that are laid out at once
template <class T>
constexpr int64_t kLine = 64 / sizeof(T);  // rows that share a list: a cache line of inputs
template <class T>
constexpr int kLineParts = kLine<T> / Lanes::width;

// Where a row of a line is: as a vector is widened, low halves come before high ones.
template <class T>
inline int64_t place_in_line(int64_t row) {
  if constexpr (sizeof(T) == 4) return row;
  constexpr int64_t width = Lanes::width;
  return row / (2 * width) * 2 * width + row % width * 2 + row / width % 2;
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
  if (rows < kLine<T>) std::memset(to, 0, in * 64);
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

// A mask's list, for some outputs.
template <class C>
struct List {
  const int32_t* offsets;
  const C* columns;
  int64_t first, last;

  List(const Group& group, int64_t first, int64_t last)
      : offsets(static_cast<const int32_t*>(group.part.first)), columns(static_cast<const C*>(group.part.second)),
        first(first), last(last) {}

  uint64_t begin() const { return offsets[first]; }
  uint64_t end() const { return offsets[last]; }
};

// Memory for what is known of one block's list, [kChains, kBlock] for chains, and the sums.
struct Pad {
  uint8_t* numbers;  // the outputs of listed weights, counted from the first
  float* values;     // listed weights
  float *chains, *sums;
};

// Number the listed weights, without a branch where an output has few.
template <class C>
void number(const List<C>& list, uint8_t* to) {
  for (int64_t output = list.first; output < list.last; output++) {
    const int64_t count = list.offsets[output + 1] - list.offsets[output];
    for (int64_t i = 0; i == 0 || i < count; i += kIdLanes)
      std::memset(to + i, static_cast<int>(output - list.first), kIdLanes);
    to += count;
  }
}

// Collect the listed weights.
template <class T, class C>
void collect(const Job<T>& job, const List<C>& list, float* to) {
  for (int64_t output = list.first; output < list.last; output++) {
    const T* w = job.weight(output);
    for (int64_t j = list.offsets[output]; j < list.offsets[output + 1]; j++) *to++ = widen(w[list.columns[j]]);
  }
}

// The sums of one row, [outputs], of numbered weights.
template <class T, class C>
__attribute__((noinline)) void sum_row(const T* w, const T* x, int64_t in, const List<C>& list, const Pad& pad) {
  const uint64_t end = list.end(), outputs = list.last - list.first;
  const C* columns = list.columns;
  const uint8_t* numbers = pad.numbers - list.begin();
  float* chains = pad.chains;
  for (uint64_t i = 0; i < kChains * kBlock; i += Lanes::width) Lanes::store(chains + i, Lanes::fill(0.0f));
  const auto add = [&](uint64_t j, float* chain) __attribute__((always_inline)) {
    const int64_t output = numbers[j], column = columns[j];
    chain[output] = Lanes::fma(widen(w[output * in + column]), widen(x[column]), chain[output]);
  };
  uint64_t j = list.begin();
  for (; j < end && j % kChains; j++) add(j, chains + j % kChains * kBlock);
  for (; j + kChains <= end; j += kChains)
#pragma GCC unroll 4
    for (uint64_t i = 0; i < kChains; i++) add(j + i, chains + i * kBlock);
  for (; j < end; j++) add(j, chains + j % kChains * kBlock);
  for (uint64_t i = 0; i < outputs; i++)
    pad.sums[i] = (chains[i] + chains[kBlock + i]) + (chains[2 * kBlock + i] + chains[3 * kBlock + i]);
}

// The same for all rows of `lines` at once, [rows, kBlock], of collected weights.
template <class T, class C>
__attribute__((noinline)) void sum_lines(const List<C>& list, const T* lines, int64_t rows, const Pad& pad) {
  constexpr int parts = kLineParts<T>;
  const uint64_t end = list.end();
  const float* values = pad.values - list.begin();
  for (int64_t output = list.first; output < list.last; output++) {
    F chains[kChains][parts];
    for (auto& chain : chains)
      for (auto& part : chain) part = Lanes::fill(0.0f);
    const uint64_t stop = list.offsets[output + 1];
    for (uint64_t j = list.offsets[output]; j < stop; j++) {
      const F value = Lanes::fill(values[j]);
      const T* line = lines + list.columns[j] * kLine<T>;
      __builtin_prefetch(lines + list.columns[std::min<uint64_t>(j + kSoon, end - 1)] * kLine<T>);
      F* chain = chains[j % kChains];
      each_of<parts>([&](auto part) __attribute__((always_inline)) {
        chain[part] = Lanes::fma(value, Lanes::line<part.value>(line), chain[part]);
      });
    }
    float line[kLine<T>];
    for (int part = 0; part < parts; part++) {
      const F some = chains[0][part] + chains[1][part], others = chains[2][part] + chains[3][part];
      Lanes::store(line + part * Lanes::width, some + others);
    }
    for (int64_t row = 0; row < rows; row++) pad.sums[row * kBlock + output - list.first] = line[row];
  }
}

// The product without the pruned weights, one by one: where one of them is not finite, it cannot be subtracted.
template <class T, class C>
float without(const Job<T>& job, const List<C>& list, int64_t output, int64_t row) {
  const T *w = job.weight(output), *x = job.input(row);
  float sum = 0.0f;
  int32_t next = list.offsets[output];
  for (int64_t k = 0; k < job.call.in; k++) {
    if (next < list.offsets[output + 1] && list.columns[next] == k)
      next++;
    else
      sum = Lanes::fma(widen(w[k]), widen(x[k]), sum);
  }
  return sum;
}

// Take a row's sums from its products.
template <class T, class C>
void take(const Job<T>& job, const List<C>& list, float strength, int64_t row, const float* sums, float* y) {
  const int64_t outputs = list.last - list.first;
  uint32_t largest = 0;
  for (int64_t i = 0; i < outputs; i++) {
    y[i] = Lanes::fma(-strength, sums[i], y[i]);
    uint32_t bits;
    std::memcpy(&bits, y + i, sizeof bits);
    largest = std::max(largest, bits & 0x7fffffffu);
  }
  if (__builtin_expect(largest < 0x7f800000u, 1) || strength != 1.0f) return;
  for (int64_t i = 0; i < outputs; i++)
    if (!__builtin_isfinite(y[i])) y[i] = without(job, list, list.first + i, row);
}

template <class T, class C>
void subtract(const Job<T>& job, const Listed<T>& listed, const Stage& stage, const Pad& pad) {
  const List<C> list(*listed.group, stage.first, stage.last);
  const float strength = listed.group->strength;
  const auto take_from = [&](int64_t row, const float* sums) {
    take(job, list, strength, row, sums, stage.of(false, row, stage.first));
  };
  if (!listed.lines) {
    number(list, pad.numbers);
    for (int64_t row = listed.start; row < listed.stop; row++) {
      sum_row(job.weight(list.first), job.input(row), job.call.in, list, pad);
      take_from(row, pad.sums);
    }
    return;
  }
  if (listed.leads) collect(job, list, pad.values);
  sum_lines(list, listed.lines, listed.stop - listed.start, pad);
  for (int64_t row = listed.start; row < listed.stop; row++) take_from(row, pad.sums + (row - listed.start) * kBlock);
}

}  // namespace
