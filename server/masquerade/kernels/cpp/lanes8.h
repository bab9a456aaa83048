// Eight fp32 lanes, in the compiler's vector types: AVX2 and FMA where the unit is built for them, anything elsewhere.
//
// `read<part>` loads weights of one step, and `effective<mode, part>` makes fp32 of them as a mask has them: of 32 of
// fp32 a quarter, of 16 of bf16 the even (part 0) or the odd ones. Keep bits are LSB first; a pruned weight is replaced
// by 0 (hard) or scaled (soft), never used as is. `line<part>` loads vectors of a cache line of inputs, in that order.
// Of lists, `count` loads how many weights the lanes have, `more` says which have more than `step`, `gather` fetches inputs.
#pragma once
#if defined(__FMA__)
#include <immintrin.h>
#endif
#include <cstdint>
#include <cstring>

namespace {

enum class Mode { dense, hard, soft };

struct Lanes {
  typedef float F __attribute__((vector_size(32)));
  typedef float Quad __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(32)));
  typedef uint16_t S __attribute__((vector_size(32)));
  typedef uint16_t H __attribute__((vector_size(16)));

  static constexpr int width = 8;
  template <class T>
  static constexpr int parts = sizeof(T) == 4 ? 4 : 2;
  template <class T>
  static constexpr int step = width * parts<T>;
  template <class T>
  using Input = float;
  template <class T>
  static constexpr int64_t in_order = sizeof(T) == 4 ? 2048 : 1024;  // inputs, see direct.h
  static constexpr int matrix = 0;  // lines of a register that is one
  struct Registers {};
  static constexpr int rows = 3;  // 4 x 3 accumulators, 3 inputs and a weight fill sixteen registers
  static constexpr int each = 2;  // rows with a mask each

  template <class V, class T>
  static inline V copy(const T* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  static inline F load(const float* from) { return copy<F>(from); }
  static inline void store(float* to, F value) { std::memcpy(to, &value, sizeof value); }
  static inline F fill(float value) { return F{value, value, value, value, value, value, value, value}; }
  static inline F larger(F a, F b) { return a > b ? a : b; }  // b where either is NaN
  static inline float largest(F lanes) {
    return combine(lanes, [](float a, float b) { return a > b ? a : b; });
  }
  static inline float sum(F lanes) {
    return combine(lanes, [](float a, float b) { return a + b; });
  }

#if defined(__FMA__)
  static inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
  static inline F fma(F a, F b, F c) { return a * b + c; }
  static inline float fma(float a, float b, float c) { return a * b + c; }
#endif

  // The sums over the lanes of four vectors, always added in the same tree.
  static inline void reduce(F a, F b, F c, F d, float* to) {
    const Quad ab = pairs(fold(a), fold(b)), cd = pairs(fold(c), fold(d)), sums = pairs(ab, cd);
    std::memcpy(to, &sums, sizeof sums);
  }

  template <int part>
  static inline F read(const float* from) { return load(from + part * width); }
  template <int part>
  static inline S read(const uint16_t* from) { return copy<S>(from); }

  template <Mode mode, int part>
  static inline F effective(F raw, const uint8_t* keep, F gamma) {
    if constexpr (mode == Mode::dense) return raw;
    const I bit = I{1, 2, 4, 8, 16, 32, 64, 128} << 8 * part;
    const I kept = ((I{} + copy<int32_t>(keep)) & bit) == bit;
    if constexpr (mode == Mode::hard) return (F)((I)raw & kept);
    return raw * (kept ? fill(1.0f) : gamma);
  }

  template <Mode mode, int part>
  static inline F effective(S raw, const uint8_t* keep, F gamma) {
    if constexpr (mode == Mode::dense) return widen<part>(raw);
    const S bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    const S kept = (S)(((S{} + copy<uint16_t>(keep)) & bit) == bit);
    if constexpr (mode == Mode::hard) return widen<part>(raw & kept);
    const I sign = part ? (I)kept : (I)kept << 16;
    return widen<part>(raw) * (sign < 0 ? fill(1.0f) : gamma);
  }

  // Quantised weights: fp16 to fp32, 8 at a time, and 32 inputs of 4 outputs to bf16, of which `take` gets vectors.
  static inline void widen_halves(const uint16_t* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += width) {
      const I half = __builtin_convertvector(copy<H>(from + i), I), exponent = half & 0x7c00;
      const I bias = exponent == 0x7c00 ? I{} + (224 << 23) : exponent ? I{} + (112 << 23) : I{} + (113 << 23);
      const F value = (F)(((half & 0x7fff) << 13) + bias), small = value - 0x1p-14f;
      const F signed_ = (F)((exponent ? (I)value : (I)small) | (half & 0x8000) << 16);
      store(to + i, signed_ == signed_ ? signed_ : fill(__builtin_nanf("")));  // one that `round` does not carry
    }
  }
  // Bytes, as many times the width, times the same four numbers again and again.
  static inline void multiply_fours(const int8_t* from, int64_t count, const float* fours, float* to) {
    typedef int8_t B __attribute__((vector_size(8)));
    const Quad factor = copy<Quad>(fours);
    const F factors = join(factor, factor);
    for (int64_t i = 0; i < count; i += width) store(to + i, __builtin_convertvector(copy<B>(from + i), F) * factors);
  }
  static constexpr bool fuses = false;
  template <int zero, bool offset, class Take>
  static inline void four_bits(const uint8_t* codes, const float* scales, const float* offsets, const Take& take) {
    for (int at = 0; at < 32; at += 16) {
#pragma GCC unroll 4
      for (int m = 0; m < 4; m++) {
        const I pairs = __builtin_convertvector(copy<H>(codes + m / 2 * 32 + at), I) >> m % 2 * 4;
        const F scale = fill(scales[m]), shift = fill(offset ? offsets[m] : 0.0f);  // products are exact, fused or not
        const auto value = [&](I code) { return fma(__builtin_convertvector((code & 15) - zero, F), scale, shift); };
        take(m, at, pair(round(value(pairs)), round(value(pairs >> 8))));
      }
    }
  }
  // `apart` is from the scales of the first 16 inputs to those of the last.
  template <int apart, bool offset, class Take>
  static inline void eight_bits(const uint8_t* codes, const float* scales, const float* offsets, const Take& take) {
    for (int m = 0; m < 4; m++)
      for (int at = 0; at < 32; at += 16) {
        const I words = __builtin_convertvector(copy<H>(codes + m * 32 + at), I);
        const F scale = fill(scales[m + at / 16 * apart]), shift = fill(offset ? offsets[m] : 0.0f);
        const auto value = [&](I code) { return fma(__builtin_convertvector(code, F), scale, shift); };
        take(m, at, pair(round(value(words << 24 >> 24)), round(value(words << 16 >> 24))));
      }
  }

  static constexpr bool rounds = true;  // inputs to 8 bits, if asked to
  // Integers: 32 inputs of 8 bits, codes of `bits` of as many inputs of 4 outputs, and the sums of their products, four
  // of them a lane and `beside` outputs a vector; four of fp16 or bytes to fp32; and one of four, or of twice four, in
  // the lanes of its half.
  static constexpr int beside = 1;
  typedef F Partial;
#if defined(__AVX2__)
  template <int bits>
  struct Inputs {
    __m256i levels;
    explicit Inputs(const int8_t* from) : levels(copy<__m256i>(from)) {}
  };
  template <int bits>
  struct Codes {
    __m256i levels[4];
    explicit Codes(const uint8_t* from) {
      for (int m = 0; m < 4; m++)
        if constexpr (bits == 8) levels[m] = copy<__m256i>(from + m * 32);
        else levels[m] = _mm256_srli_epi16(copy<__m256i>(from + m / 2 * 32), m % 2 * 4) & _mm256_set1_epi8(15);
    }
    template <int m>
    F multiply(const Inputs<bits>& inputs) const {  // a pair of products stays below 2^15
      const __m256i level = bits == 8 ? _mm256_abs_epi8(levels[m]) : levels[m], x = inputs.levels;
      const __m256i pairs = _mm256_maddubs_epi16(level, bits == 8 ? _mm256_sign_epi8(x, levels[m]) : x);
      return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
  };
  static inline Quad widen_four(const uint16_t* from) { return _mm_cvtph_ps(copy<__m128i>(from)); }
  static inline Quad widen_four(const int8_t* from) {
    return _mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(copy<int32_t>(from))));
  }
  template <int m>
  static inline F spread(F fours) { return _mm256_permute_ps(fours, m * 0x55); }
#else
  template <int bits>
  struct Inputs {
    const int8_t* levels;
    explicit Inputs(const int8_t* from) : levels(from) {}
  };
  template <int bits>
  struct Codes {
    const uint8_t* from;
    explicit Codes(const uint8_t* from) : from(from) {}
    template <int m>
    F multiply(const Inputs<bits>& inputs) const {
      int32_t sums[width] = {};
      for (int k = 0; k < 32; k++)
        sums[k / 4] += inputs.levels[k] * (bits == 8 ? static_cast<int8_t>(from[m * 32 + k]) : from[m / 2 * 32 + k] >> m % 2 * 4 & 15);
      return __builtin_convertvector(copy<I>(sums), F);
    }
  };
  static inline Quad widen_four(const uint16_t* from) {
    float wide[width];
    widen_halves(from, width, wide);
    return copy<Quad>(wide);
  }
  static inline Quad widen_four(const int8_t* from) {
    return Quad{float(from[0]), float(from[1]), float(from[2]), float(from[3])};
  }
  template <int m>
  static inline F spread(F fours) { return __builtin_shufflevector(fours, fours, m, m, m, m, m + 4, m + 4, m + 4, m + 4); }
#endif
  static inline F join(Quad low, Quad high) { return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7); }

  static inline I count(const uint16_t* counts) { return __builtin_convertvector(copy<H>(counts), I); }
  static inline I count(const uint32_t* counts) { return copy<I>(counts); }
  static inline I more(I counts, int32_t step) { return counts > step; }
  static inline int size(I lanes) {
#if defined(__FMA__)
    return __builtin_popcount(_mm256_movemask_ps((__m256)lanes));
#else
    int found = 0;
    for (int i = 0; i < width; i++) found -= lanes[i];
    return found;
#endif
  }
  static inline F fma_where(I lanes, F a, F b, F c) { return lanes ? fma(a, b, c) : c; }
  template <class C>
  static inline F gather(const float* x, const C* at) {
    return F{x[at[0]], x[at[1]], x[at[2]], x[at[3]], x[at[4]], x[at[5]], x[at[6]], x[at[7]]};
  }
  template <class C>
  static inline F gather(const uint16_t* x, const C* at) {
    return widen(H{x[at[0]], x[at[1]], x[at[2]], x[at[3]], x[at[4]], x[at[5]], x[at[6]], x[at[7]]});
  }
  static inline void look_up(const float* from, const uint8_t* places, float* to) {
    for (int i = 0; i < 64; i++) to[i] = from[places[i]];
  }
  static inline F widen(const float* from) { return load(from); }
  static inline F widen(const uint16_t* from) { return widen(copy<H>(from)); }

  template <int part>
  static inline F line(const float* from) { return load(from + part * width); }
  template <int part>
  static inline F line(const uint16_t* from) { return widen<part % 2>(copy<S>(from + part / 2 * 16)); }

 private:
  template <class Operation>
  static inline float combine(F vector, const Operation& operation) {  // always in the same tree
    float lanes[width];
    store(lanes, vector);
    for (int half = width / 2; half; half /= 2)
      for (int i = 0; i < half; i++) lanes[i] = operation(lanes[i], lanes[i + half]);
    return lanes[0];
  }
  static inline F widen(H value) { return (F)(__builtin_convertvector(value, I) << 16); }
  template <int part>
  static inline F widen(S value) {
    if constexpr (part == 0) return (F)((I)value << 16);
    return (F)((I)value & (I{} + static_cast<int32_t>(0xffff0000)));
  }
  static inline I round(F value) {  // to bf16, in the high half; ties to even
    const I bits = (I)value;
    return bits + 0x7fff + (bits >> 16 & 1);
  }
  static inline S pair(I even, I odd) { return (S)((even >> 16 & 0xffff) | (odd & static_cast<int32_t>(0xffff0000))); }
  static inline Quad fold(F v) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  }
  static inline Quad pairs(Quad a, Quad b) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
  }
};

}  // namespace
