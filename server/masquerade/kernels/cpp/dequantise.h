// The values of quantised weights, tile by tile, in terms of `Lanes`: what the kernels multiply in place of plain ones.
#pragma once
#include "quantised.h"

namespace {

constexpr int64_t kGroups = 64;  // groups of inputs whose scales are widened at once

// Inputs `start` to `stop` of a tile's outputs, bf16 with `stride` between outputs; `stop - start` is a multiple of kInputs.
template <int32_t form>
void dequantise_as(const QuantisedTile& tile, int64_t start, int64_t stop, uint16_t* to, int64_t stride) {
  constexpr Quantisation how(form);
  float scales[kGroups * kOutputs + 16], offsets[kGroups * kOutputs + 16];
  for (int64_t first = start / kInputs; first < stop / kInputs; first += kGroups) {
    const int64_t groups = std::min(kGroups, stop / kInputs - first);
    Lanes::widen_halves(tile.scales + first * kOutputs, groups * kOutputs, scales);
    if constexpr (how.offset) Lanes::widen_halves(tile.offsets + first * kOutputs, groups * kOutputs, offsets);
    for (int64_t group = 0; group < groups; group++, to += kInputs) {
      const uint8_t* codes = tile.codes + (first + group) * how.codes();
      if constexpr (how.bits == 4)
        Lanes::four_bits<how.zero, how.offset>(codes, scales + group * kOutputs, offsets + group * kOutputs, to, stride);
      else
        Lanes::eight_bits(codes, scales + group * kOutputs, to, stride);
    }
  }
}

inline void dequantise(int32_t form, const void* weight, int64_t in, int64_t output, int64_t start, int64_t stop,
                       uint16_t* to, int64_t stride) {
  constexpr decltype(&dequantise_as<kQ4_0>) kForms[] = {dequantise_as<kQ4_0>, dequantise_as<kQ4_1>, dequantise_as<kQ8_0>};
  kForms[form - kQ4_0](QuantisedTile(Quantisation(form), weight, output, in), start, stop, to, stride);
}

}  // namespace
