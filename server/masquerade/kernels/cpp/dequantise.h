// The values of quantised weights, tile by tile, in terms of `Lanes`: what the kernels multiply in place of plain ones.
#pragma once
#include "quantised.h"

namespace {

constexpr int64_t kGroups = 64;  // groups of kInputs whose scales are widened at once

// `count` scales of a tile's outputs, or offsets, from one on, in fp32.
template <int32_t form>
inline __attribute__((always_inline)) void widen_scales(const Scales& scales, int64_t first, int64_t count, float* to) {
  constexpr Quantisation how(form);
  if constexpr (how.nested == 1) return Lanes::widen_halves(scales.halves + first * kOutputs, count * kOutputs, to);
  constexpr int64_t most = kGroups * kInputs / kSuper * kOutputs;
  float halves[most + Lanes::width];
  Lanes::widen_halves(scales.halves + first / how.nested * kOutputs, count / how.nested * kOutputs, halves);
  constexpr int64_t nested = how.nested * kOutputs;
  const int8_t* multiples = scales.multiples + first * kOutputs;
  for (int64_t at = 0; at < count * kOutputs; at += nested)
    Lanes::multiply_fours(multiples + at, nested, halves + at / how.nested, to + at);
}

// Calls `take` with inputs `start` to `stop` of a tile, both multiples of kInputs: an output of the tile, an input and a
// vector of bf16 from there on. Calls `begin` before each group of inputs.
template <int32_t form, class Begin, class Take>
inline __attribute__((always_inline)) void dequantise(const QuantisedTile& tile, int64_t start, int64_t stop,
                                                      const Begin& begin, const Take& take) {
  constexpr Quantisation how(form);
  constexpr int64_t parts = kInputs / how.inputs;  // of kInputs with a scale each
  static_assert(parts == 1 || !how.offset);
  float scales[parts * kGroups * kOutputs + Lanes::width], offsets[kGroups * kOutputs + Lanes::width];
  for (int64_t first = start / kInputs; first < stop / kInputs; first += kGroups) {
    const int64_t groups = std::min(kGroups, stop / kInputs - first);
    widen_scales<form>(tile.scales, first * parts, groups * parts, scales);
    if constexpr (how.offset) widen_scales<form>(tile.offsets, first, groups, offsets);
    for (int64_t group = 0; group < groups; group++) {
      const int64_t k = (first + group) * kInputs;
      const uint8_t* codes = tile.codes + (first + group) * how.codes();
      const auto place = [&](int m, int at, auto values) __attribute__((always_inline)) { take(m, k + at, values); };
      const float *scale = scales + group * parts * kOutputs, *offset = offsets + group * kOutputs;
      begin(k);
      if constexpr (how.bits == 4)
        Lanes::four_bits<how.zero, how.offset>(codes, scale, offset, place);
      else
        Lanes::eight_bits<(parts - 1) * kOutputs, how.offset>(codes, scale, offset, place);
    }
  }
}

// Keeps them: output after output, `stride` apart.
template <int32_t form>
void dequantise_to(const QuantisedTile& tile, int64_t start, int64_t stop, uint16_t* to, int64_t stride) {
  dequantise<form>(tile, start, stop, [](int64_t) {}, [&](int m, int64_t k, auto values) __attribute__((always_inline)) {
    std::memcpy(to + m * stride + k - start, &values, sizeof values);
  });
}

}  // namespace
