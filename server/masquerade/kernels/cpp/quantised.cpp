// Lays out quantised weights, and reads them again. Built without any special instructions.
#include "quantised.h"

#include <algorithm>
#include <cstring>

namespace {

float widen_half(uint16_t half) {
  const uint32_t rest = (half & 0x7fffu) << 13, exponent = half & 0x7c00u;
  const uint32_t shifted = rest + (exponent == 0x7c00u ? 224u << 23 : exponent ? 112u << 23 : 113u << 23);
  float value;
  std::memcpy(&value, &shifted, sizeof value);
  if (!exponent) value -= 0x1p-14f;
  return half & 0x8000u ? -value : value;
}

uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, quiet = bits >> 16 | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// A block of GGUF, unpacked: codes that are kept as they are, scales and offsets.
struct Block {
  int8_t codes[kSuper];
  uint16_t scale, offset;
  int8_t scales[kSuper / 16], offsets[kSuper / kInputs];  // their multiples
};

// How blocks are packed: their inputs and bytes.
struct Packing {
  int64_t inputs, size;
  void (*unpack)(const uint8_t* from, Block& block);
};

// A scale, an offset if there is one, fifth bits if codes have one, and codes: bytes, or nibbles of both halves.
template <int bits, bool offset, int zero>
void unpack_plain(const uint8_t* from, Block& block) {
  const auto take = [&](void* to, size_t size) { std::memcpy(to, from, size), from += size; };
  uint32_t fifth = 0;
  take(&block.scale, sizeof block.scale);
  if constexpr (offset) take(&block.offset, sizeof block.offset);
  if constexpr (bits == 5) take(&fifth, sizeof fifth);
  for (int k = 0; k < kInputs; k++) {
    const int nibble = from[k % (kInputs / 2)] >> (k < kInputs / 2 ? 0 : 4) & 15;
    const int code = bits == 8 ? from[k] : nibble | (fifth >> k & 1) << 4;
    block.codes[k] = static_cast<int8_t>(code - zero);
  }
}

// A scale and an offset, multiples of 6 bits of both, fifth bits, and nibbles of which each 32 bytes have 64.
template <int bits>
void unpack_nested(const uint8_t* from, Block& block) {
  std::memcpy(&block.scale, from, sizeof block.scale);
  std::memcpy(&block.offset, from + 2, sizeof block.offset);
  const uint8_t *packed = from + 4, *fifth = packed + 12, *nibbles = bits == 5 ? fifth + kInputs : fifth;
  for (int group = 0; group < kSuper / kInputs; group++) {
    const uint8_t *low = packed + group % 4, *high = packed + 8 + group % 4;
    block.scales[group] = static_cast<int8_t>(group < 4 ? low[0] & 63 : (high[0] & 15) | low[0] >> 6 << 4);
    block.offsets[group] = static_cast<int8_t>(-(group < 4 ? low[4] & 63 : high[0] >> 4 | low[4] >> 6 << 4));
    for (int k = 0; k < kInputs; k++) {
      const int nibble = nibbles[group / 2 * kInputs + k] >> group % 2 * 4 & 15;
      block.codes[group * kInputs + k] = static_cast<int8_t>(bits == 5 ? nibble | (fifth[k] >> group & 1) << 4 : nibble);
    }
  }
}

// Nibbles, pairs of bits, multiples of the scale, the scale: of each 128 codes, 64 bytes have nibbles and 32 have pairs.
void unpack_q6_k(const uint8_t* from, Block& block) {
  const uint8_t *pairs = from + kSuper / 2, *multiples = pairs + kSuper / 4;
  for (int at = 0; at < kSuper; at++) {
    const int half = at / 128, part = at % 128 / 32, k = at % 32;
    const int nibble = from[half * 64 + part % 2 * 32 + k] >> part / 2 * 4 & 15;
    block.codes[at] = static_cast<int8_t>((nibble | (pairs[half * 32 + k] >> part * 2 & 3) << 4) - 32);
  }
  std::memcpy(block.scales, multiples, sizeof block.scales);
  std::memcpy(&block.scale, multiples + sizeof block.scales, sizeof block.scale);
}

constexpr Packing kPackings[] = {  // by form
    {},
    {32, 18, unpack_plain<4, false, 0>},
    {32, 20, unpack_plain<4, true, 0>},
    {32, 22, unpack_plain<5, false, 16>},
    {32, 24, unpack_plain<5, true, 0>},
    {32, 34, unpack_plain<8, false, 0>},
    {256, 144, unpack_nested<4>},
    {256, 176, unpack_nested<5>},
    {256, 210, unpack_q6_k},
};

void place(const Scales& to, const Quantisation& how, int64_t start, int64_t inputs, int64_t output, uint16_t half,
           const int8_t* multiples) {
  const_cast<uint16_t*>(to.halves)[start / (how.inputs * how.nested) * kOutputs + output] = half;
  if (how.nested == 1) return;
  for (int64_t k = 0; k < inputs; k += how.inputs)
    const_cast<int8_t*>(to.multiples)[(start + k) / how.inputs * kOutputs + output] = multiples[k / how.inputs];
}

// Place a block's `inputs` from `start` on.
void place(const QuantisedTile& tile, const Quantisation& how, int64_t start, int64_t inputs, int64_t output,
           const Block& block) {
  uint8_t* codes = const_cast<uint8_t*>(tile.codes) + start / kInputs * how.codes();
  for (int64_t k = 0; k < inputs; k++) {
    uint8_t* group = codes + k / kInputs * how.codes();
    if (how.bits == 8)
      group[output * kInputs + k % kInputs] = static_cast<uint8_t>(block.codes[k]);
    else
      group[output / 2 * kInputs + k % kInputs] |= block.codes[k] << output % 2 * 4;
  }
  place(tile.scales, how, start, inputs, output, block.scale, block.scales);
  if (how.offset) place(tile.offsets, how, start, inputs, output, block.offset, block.offsets);
}

float find(const Scales& scales, const Quantisation& how, int64_t k, int64_t output) {
  const float half = widen_half(scales.halves[k / (how.inputs * how.nested) * kOutputs + output]);
  return how.nested == 1 ? half : half * scales.multiples[k / how.inputs * kOutputs + output];
}

void read_row(const Quantisation& how, const QuantisedTile& tile, int64_t output, int64_t in, uint16_t* to) {
  for (int64_t start = 0; start < in; start += how.inputs) {
    const uint8_t* codes = tile.codes + start / kInputs * how.codes();
    const float scale = find(tile.scales, how, start, output);
    const float offset = how.offset ? find(tile.offsets, how, start, output) : 0.0f;
    for (int64_t k = start; k < start + how.inputs; k++) {
      const int8_t byte = static_cast<int8_t>(codes[output * kInputs + k % kInputs]);
      const int level = how.bits == 8 ? byte : (codes[output / 2 * kInputs + k % kInputs] >> output % 2 * 4 & 15) - how.zero;
      to[k] = narrow(scale * level + offset);
    }
  }
}

}  // namespace

extern "C" int64_t masquerade_quantised_size(int32_t form, int64_t out, int64_t in) {
  return (out + kOutputs - 1) / kOutputs * Quantisation(form).tile(in) + 64;  // a vector may be loaded whole
}

extern "C" void masquerade_quantised_write(int32_t form, const void* blocks, int64_t first, int64_t count, int64_t in,
                                           void* weight) {
  const Quantisation how(form);
  const Packing& packing = kPackings[form];
  const uint8_t* from = static_cast<const uint8_t*>(blocks);
  Block block;
  for (int64_t output = first; output < first + count; output++) {
    const QuantisedTile tile(how, weight, output, in);
    if (output % kOutputs == 0) std::memset(const_cast<uint8_t*>(tile.codes), 0, how.tile(in));
    for (int64_t start = 0; start < in; start += packing.inputs, from += packing.size) {
      packing.unpack(from, block);
      place(tile, how, start, packing.inputs, output % kOutputs, block);
    }
  }
}

extern "C" void masquerade_quantised_read(int32_t form, const void* weight, const int64_t* outputs, int64_t count,
                                          int64_t in, void* to) {
  const Quantisation how(form);
  for (int64_t row = 0; row < count; row++)
    read_row(how, QuantisedTile(how, weight, outputs[row], in), outputs[row] % kOutputs, in,
             static_cast<uint16_t*>(to) + row * in);
}
