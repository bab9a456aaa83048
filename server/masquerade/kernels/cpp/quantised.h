// A quantised weight as it is multiplied: GGUF's codes and scales, laid out so that a tile of outputs is read at once.
//
// A weight's value is scale * (code - zero) + offset, rounded to bf16. kInputs of an output have one scale and offset.
// A tile begins a cache line: codes first, kInputs after kInputs, then scales and offsets. Codes of 8 bits are bytes,
// output after output; codes of 4 bits are nibbles of bytes, an even output's the low ones and the next one's the high.
#pragma once
#include <cstdint>

#include "product.h"

namespace {

constexpr int64_t kOutputs = 4;  // of a tile
constexpr int64_t kInputs = 32;  // of a scale

// How the weights of a form are laid out.
struct Quantisation {
  int bits, zero;
  bool offset;

  constexpr explicit Quantisation(int32_t form)
      : bits(form == kQ8_0 ? 8 : 4), zero(form == kQ4_0 ? 8 : 0), offset(form == kQ4_1) {}

  // Bytes: of the codes of a tile's kInputs, of its scales and offsets for as many, and of a tile.
  constexpr int64_t codes() const { return kOutputs * kInputs * bits / 8; }
  constexpr int64_t scales() const { return kOutputs * sizeof(uint16_t) * (offset ? 2 : 1); }
  constexpr int64_t tile(int64_t in) const { return (in / kInputs * (codes() + scales()) + 63) / 64 * 64; }
};

// One tile of a weight.
struct QuantisedTile {
  const uint8_t* codes;
  const uint16_t *scales, *offsets;  // fp16 [in / kInputs, kOutputs]

  QuantisedTile(const Quantisation& how, const void* weight, int64_t output, int64_t in)
      : codes(static_cast<const uint8_t*>(weight) + output / kOutputs * how.tile(in)),
        scales(reinterpret_cast<const uint16_t*>(codes + in / kInputs * how.codes())),
        offsets(scales + in / kInputs * kOutputs) {}
};

}  // namespace
