// The values of quantised weights, tile by tile, in terms of `Lanes`: what the kernels multiply in place of plain ones.
#pragma once
#include "quantised.h"

namespace {

constexpr int64_t kGroups = 64;  // groups of inputs whose scales are widened at once

// Calls `take` with inputs `start` to `stop` of a tile, both multiples of kInputs: an output of the tile, an input and a
// vector of bf16 from there on. Calls `begin` before each group of inputs.
template <int32_t form, class Begin, class Take>
inline __attribute__((always_inline)) void dequantise(const QuantisedTile& tile, int64_t start, int64_t stop,
                                                      const Begin& begin, const Take& take) {
  constexpr Quantisation how(form);
  float scales[kGroups * kOutputs + Lanes::width], offsets[kGroups * kOutputs + Lanes::width];
  for (int64_t first = start / kInputs; first < stop / kInputs; first += kGroups) {
    const int64_t groups = std::min(kGroups, stop / kInputs - first);
    Lanes::widen_halves(tile.scales + first * kOutputs, groups * kOutputs, scales);
    if constexpr (how.offset) Lanes::widen_halves(tile.offsets + first * kOutputs, groups * kOutputs, offsets);
    for (int64_t group = 0; group < groups; group++) {
      const int64_t k = (first + group) * kInputs;
      const uint8_t* codes = tile.codes + (first + group) * how.codes();
      const auto place = [&](int m, int at, auto values) __attribute__((always_inline)) { take(m, k + at, values); };
      begin(k);
      if constexpr (how.bits == 4)
        Lanes::four_bits<how.zero, how.offset>(codes, scales + group * kOutputs, offsets + group * kOutputs, place);
      else
        Lanes::eight_bits(codes, scales + group * kOutputs, place);
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

using Dequantise = decltype(&dequantise_to<kQ4_0>);
constexpr Dequantise kDequantise[] = {nullptr, dequantise_to<kQ4_0>, dequantise_to<kQ4_1>, dequantise_to<kQ8_0>};  // by form

}  // namespace
