// Rows whose inputs are rounded to 8 bits, and quantised weights: sums of integers, one for kInputs inputs.
//
// Each kInputs of a row have a scale, their largest magnitude over 127, as in llama.cpp's Q8_0. A row's scales are its
// own, so rows stay independent. Sums of integers are exact; they are scaled and added up in fp32, in their order.
#pragma once
#include <cmath>

#include "job.h"

namespace {

constexpr float kLevels = 127.0f;

// Rows [rows, in], and for each kInputs of them a scale, and the scale times the sum of the codes.
struct Rounded {
  int8_t* codes;
  float *scales, *sums;
  int64_t rows, in;

  // Round a row. One that is not finite has a scale that is not a number.
  void round(int64_t row, const T16* x) const {
    for (int64_t k = 0; k < in; k += kInputs) {
      float values[kInputs], largest = 0.0f, nothing = 0.0f;
      for (int64_t i = 0; i < kInputs; i++) values[i] = widen(x[k + i]);
      for (int64_t i = 0; i < kInputs; i++) nothing += values[i] * 0.0f;
      for (int64_t i = 0; i < kInputs; i++) largest = std::fabs(values[i]) > largest ? std::fabs(values[i]) : largest;
      const float inverse = kLevels / largest;  // infinite if the largest is next to nothing
      const bool usable = nothing == 0.0f && std::isfinite(inverse);
      int32_t sum = 0;
      int8_t* code = codes + row * in + k;
      for (int64_t i = 0; i < kInputs; i++) {
        const int32_t level = __builtin_irintf(usable ? values[i] * inverse : 0.0f);  // ties to even
        code[i] = static_cast<int8_t>(level);
        sum += level;
      }
      const int64_t group = (row * in + k) / kInputs;
      scales[group] = largest / kLevels + nothing;
      sums[group] = scales[group] * static_cast<float>(sum);
    }
  }
};

// A scale, or an offset, of the outputs of a tile, in fp32.
template <class L, int32_t form>
inline typename L::Quad widen_scale(const Scales& scales, int64_t at) {
  constexpr Quantisation how(form);
  const typename L::Quad halves = L::widen_four(scales.halves + at / how.nested * kTile);
  if constexpr (how.nested == 1) return halves;
  else return halves * L::widen_four(scales.multiples + at * kTile);
}

// kTile outputs of `n` rows from `row` on. `L` is `Lanes`; units whose lanes do not round need not have what this uses.
template <class L, int32_t form, int n>
void multiply_rounded(const QuantisedTile& tile, const Rounded& x, int64_t row, float* sums, Ahead& ahead_) {
  using Four = typename L::Quad;
  constexpr Quantisation how(form);
  constexpr int vectors = kTile / L::beside;
  const int64_t groups = x.in / kInputs;
  Ahead ahead = ahead_;
  typename L::Partial total[vectors][n];
  Four rest[n];  // what zeros and offsets come to
#pragma GCC unroll 4
  for (int r = 0; r < n; r++) {
    rest[r] = Four{};
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) total[v][r] = typename L::Partial{};
  }
  for (int64_t group = 0; group < groups; group++) {
    ahead.fetch();
    const typename L::template Codes<how.bits> codes(tile.codes + group * how.codes());
    constexpr int64_t parts = kInputs / how.inputs;  // the first and the last inputs of a group may have a scale each
    const Four scales = widen_scale<L, form>(tile.scales, group * parts);
    const Four last = parts == 1 ? scales : widen_scale<L, form>(tile.scales, group * parts + 1);
    const Four offsets = how.offset ? widen_scale<L, form>(tile.offsets, group) : scales * static_cast<float>(-how.zero);
#pragma GCC unroll 4
    for (int r = 0; r < n; r++) {
      const int64_t at = (row + r) * groups + group;
      const auto scale = L::join(scales * x.scales[at], last * x.scales[at]);
      const typename L::template Inputs<how.bits> inputs(x.codes + at * kInputs);
      if constexpr (how.offset || how.zero) rest[r] = rest[r] + offsets * x.sums[at];
      each_of<vectors>([&](auto v) __attribute__((always_inline)) {
        auto& sum = total[v.value][r];
        sum = L::fma(codes.template multiply<v.value>(inputs), L::template spread<v.value>(scale), sum);
      });
    }
  }
  ahead_ = ahead;
#pragma GCC unroll 4
  for (int r = 0; r < n; r++) {
    float* to = sums + r * kRow;
    if constexpr (L::beside == 1) L::reduce(total[0][r], total[1][r], total[2][r], total[3][r], to);
    else L::reduce(total[0][r], total[1][r], to);
    for (int m = 0; m < kTile; m++) to[m] += rest[r][m];
  }
}

template <class L, int32_t form, int n = L::rows>
void multiply_rounded_rows(const QuantisedTile& tile, const Rounded& x, int64_t row, float* sums, Ahead& ahead) {
  if constexpr (n > 1)
    if (x.rows - row < n) return multiply_rounded_rows<L, form, n - 1>(tile, x, row, sums, ahead);
  multiply_rounded<L, form, n>(tile, x, row, sums, ahead);
}

// The tile that begins at an output, for all of the rows.
template <class L, class T>
void rounded_tile(const Job<T>& job, const Rounded& x, int64_t output, float* sums) {
  const int64_t passes = (x.rows + L::rows - 1) / L::rows;
  Ahead ahead(job.memory(output + kTile), job.tile_bytes(), passes * (x.in / kInputs));
  for (int64_t row = 0; row < x.rows; row += L::rows)
    with_form(job.call.form, [&](auto form) {
      multiply_rounded_rows<L, form.value>(job.tile(output), x, row, sums + row * kRow, ahead);
    });
}

}  // namespace
