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

// A block of GGUF: a scale, an offset if there is one, and codes; of 4 bits those of its halves share bytes.
void write_block(const Quantisation& how, const uint8_t* from, int64_t output, uint8_t* codes, uint16_t* scale,
                 uint16_t* offset) {
  std::memcpy(scale + output, from, sizeof *scale);
  from += sizeof *scale;
  if (how.offset) {
    std::memcpy(offset + output, from, sizeof *offset);
    from += sizeof *offset;
  }
  if (how.bits == 8) {
    std::memcpy(codes + output * kInputs, from, kInputs);
    return;
  }
  for (int64_t k = 0; k < kInputs; k++) {
    const int code = from[k % (kInputs / 2)] >> (k < kInputs / 2 ? 0 : 4) & 15;
    codes[output / 2 * kInputs + k] |= code << output % 2 * 4;
  }
}

void read_row(const Quantisation& how, const QuantisedTile& tile, int64_t output, int64_t in, uint16_t* to) {
  for (int64_t group = 0; group < in / kInputs; group++, to += kInputs) {
    const uint8_t* codes = tile.codes + group * how.codes();
    const float scale = widen_half(tile.scales[group * kOutputs + output]);
    const float offset = how.offset ? widen_half(tile.offsets[group * kOutputs + output]) : 0.0f;
    float levels[kInputs];
    if (how.bits == 8)
      for (int64_t k = 0; k < kInputs; k++) levels[k] = static_cast<int8_t>(codes[output * kInputs + k]);
    else
      for (int64_t k = 0; k < kInputs; k++)
        levels[k] = (codes[output / 2 * kInputs + k] >> output % 2 * 4 & 15) - how.zero;
    for (int64_t k = 0; k < kInputs; k++) to[k] = narrow(scale * levels[k] + offset);
  }
}

}  // namespace

extern "C" int64_t masquerade_quantised_size(int32_t form, int64_t out, int64_t in) {
  return (out + kOutputs - 1) / kOutputs * Quantisation(form).tile(in) + 64;  // a vector may be loaded whole
}

extern "C" void masquerade_quantised_write(int32_t form, const void* blocks, int64_t first, int64_t count, int64_t in,
                                           void* weight) {
  const Quantisation how(form);
  const int64_t size = sizeof(uint16_t) * (how.offset ? 2 : 1) + kInputs * how.bits / 8;
  const uint8_t* from = static_cast<const uint8_t*>(blocks);
  for (int64_t output = first; output < first + count; output++) {
    const QuantisedTile tile(how, weight, output, in);
    if (output % kOutputs == 0) std::memset(const_cast<uint8_t*>(tile.codes), 0, how.tile(in));
    for (int64_t group = 0; group < in / kInputs; group++, from += size)
      write_block(how, from, output % kOutputs, const_cast<uint8_t*>(tile.codes) + group * how.codes(),
                  const_cast<uint16_t*>(tile.scales) + group * kOutputs,
                  const_cast<uint16_t*>(tile.offsets) + group * kOutputs);
  }
}

extern "C" void masquerade_quantised_read(int32_t form, const void* weight, const int64_t* outputs, int64_t count,
                                          int64_t in, void* to) {
  const Quantisation how(form);
  for (int64_t row = 0; row < count; row++)
    read_row(how, QuantisedTile(how, weight, outputs[row], in), outputs[row] % kOutputs, in,
             static_cast<uint16_t*>(to) + row * in);
}
