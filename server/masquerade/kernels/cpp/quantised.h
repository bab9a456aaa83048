// A quantised weight as it is multiplied: GGUF's codes and scales, laid out so that a tile of outputs is read at once.
//
// A weight's value is scale * (code - zero) + offset, rounded to bf16. kInputs of an output have one scale and offset, in
// fp16; with K, whose blocks are of kSuper inputs, these are multiples, in a byte, of those of the block.
// A tile begins a cache line: codes first, kInputs after kInputs, then multiples, then scales and offsets. Codes of 8 bits
// are bytes, output after output; codes of 4 bits are nibbles of bytes, an even output's the low ones and the next one's
// the high. Codes of 5 and 6 bits are kept in 8, so Q5_0 is Q8_0.
#pragma once
#include <cstdint>
#include <type_traits>

#include "product.h"

namespace {

constexpr int64_t kOutputs = 4;  // of a tile
constexpr int64_t kInputs = 32;  // of a scale, at most
constexpr int64_t kSuper = 256;  // of a block of K

// How the weights of a form are laid out.
struct Quantisation {
  int bits, zero;
  bool offset;
  int64_t inputs, nested;  // inputs of a scale; scales that are multiples of one, or 1

  constexpr explicit Quantisation(int32_t form)
      : bits(form == kQ4_0 || form == kQ4_1 || form == kQ4_K ? 4 : 8),
        zero(form == kQ4_0 ? 8 : 0),
        offset(form == kQ4_1 || form == kQ5_1 || form == kQ4_K || form == kQ5_K),
        inputs(form == kQ6_K ? kInputs / 2 : kInputs),
        nested(form >= kQ4_K ? kSuper / inputs : 1) {}

  // Bytes: of the codes of a tile's kInputs, and of a tile.
  constexpr int64_t codes() const { return kOutputs * kInputs * bits / 8; }
  constexpr int64_t tile(int64_t in) const {
    const int64_t scales = (multiples(in) + halves(in) * sizeof(uint16_t)) * (offset ? 2 : 1);
    return (in / kInputs * codes() + scales + 63) / 64 * 64;
  }
  // Scales of a tile: those in a byte, and those in fp16.
  constexpr int64_t multiples(int64_t in) const { return nested == 1 ? 0 : in / inputs * kOutputs; }
  constexpr int64_t halves(int64_t in) const { return in / (inputs * nested) * kOutputs; }
};

// The scales, or the offsets, of a tile: [in / inputs, kOutputs], and of those nested in one [.., kOutputs].
struct Scales {
  const int8_t* multiples;
  const uint16_t* halves;
};

// One tile of a weight.
struct QuantisedTile {
  const uint8_t* codes;
  Scales scales, offsets;

  QuantisedTile(const Quantisation& how, const void* weight, int64_t output, int64_t in)
      : codes(static_cast<const uint8_t*>(weight) + output / kOutputs * how.tile(in)) {
    const int8_t* multiples = reinterpret_cast<const int8_t*>(codes + in / kInputs * how.codes());
    const int64_t count = how.multiples(in) * (how.offset ? 2 : 1);
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(multiples + count);
    scales = {multiples, halves};
    offsets = {multiples + how.multiples(in), halves + how.halves(in)};
  }
};

// Calls `act` with a form as a constant; of forms that are laid out alike, with one of them.
template <class Act>
inline __attribute__((always_inline)) void with_form(int32_t form, const Act& act) {
  switch (form) {
    case kQ4_0: return act(std::integral_constant<int32_t, kQ4_0>{});
    case kQ4_1: return act(std::integral_constant<int32_t, kQ4_1>{});
    case kQ5_1: return act(std::integral_constant<int32_t, kQ5_1>{});
    case kQ5_0:
    case kQ8_0: return act(std::integral_constant<int32_t, kQ8_0>{});
    case kQ4_K: return act(std::integral_constant<int32_t, kQ4_K>{});
    case kQ5_K: return act(std::integral_constant<int32_t, kQ5_K>{});
    case kQ6_K: return act(std::integral_constant<int32_t, kQ6_K>{});
  }
}

}  // namespace
