// Sixteen fp32 lanes of AVX-512. Keep bits are mask registers as they lie in memory. See lanes8.h for the interface.
//
// A unit built for AVX512_BF16 takes bf16 inputs as they are, 32 products an instruction. That instruction takes
// denormals for zeros. Weights cannot be scaled there, so soft masks are blended from the dense and the hard product.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

enum class Mode { dense, hard, soft };

struct Lanes {
  typedef __m512 F;
  typedef __m512i I;

  static constexpr int width = 16;
  template <class T>
#if defined(__AVX512BF16__)
  static constexpr int parts = 1;
  template <class T>
  using Input = T;
  template <class T>
  static constexpr int64_t in_order = sizeof(T) == 4 ? 2048 : 4096;  // inputs, see direct.h
#else
  static constexpr int parts = sizeof(T) == 4 ? 1 : 2;
  template <class T>
  using Input = float;
  template <class T>
  static constexpr int64_t in_order = 2048;
#endif
  template <class T>
  static constexpr int step = sizeof(T) == 4 ? 16 : 32;
#if defined(__AMX_BF16__)
  static constexpr int matrix = 16;  // lines of a register of AMX, see amx.h
  // The registers of a thread, all of 16 full lines, while this lives.
  struct Registers {
    Registers() {
      struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } shapes;
      _tile_loadconfig(&shapes);
    }
    ~Registers() { _tile_release(); }
  };
#else
  static constexpr int matrix = 0;
  struct Registers {};
#endif
  static constexpr int rows = 6;  // 4 x 6 accumulators of 32 registers
  static constexpr int each = 4;  // rows with a mask each

  static inline F load(const float* from) { return _mm512_loadu_ps(from); }
  static inline void store(float* to, F value) { _mm512_storeu_ps(to, value); }
  static inline F fill(float value) { return _mm512_set1_ps(value); }
  static inline F larger(F a, F b) { return _mm512_max_ps(a, b); }
  static inline float largest(F lanes) { return _mm512_reduce_max_ps(lanes); }
  static inline float sum(F lanes) { return _mm512_reduce_add_ps(lanes); }
  static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

  static inline void reduce(F a, F b, F c, F d, float* to) {
    _mm_storeu_ps(to, _mm_hadd_ps(_mm_hadd_ps(fold(a), fold(b)), _mm_hadd_ps(fold(c), fold(d))));
  }

  template <int part>
  static inline F read(const float* from) { return _mm512_loadu_ps(from); }
  template <int part>
  static inline __m512i read(const uint16_t* from) { return _mm512_loadu_si512(from); }

  template <Mode mode, int part>
  static inline F effective(F raw, const uint8_t* keep, F gamma) {
    if constexpr (mode == Mode::dense) return raw;
    uint16_t kept;
    std::memcpy(&kept, keep, sizeof kept);
    if constexpr (mode == Mode::hard) return _mm512_maskz_mov_ps(kept, raw);
    return _mm512_mask_mul_ps(raw, static_cast<__mmask16>(~kept), raw, gamma);
  }

#if defined(__AVX512BF16__)
  static inline __m512i load(const uint16_t* from) { return _mm512_loadu_si512(from); }
  static inline void store(uint16_t* to, __m512i value) { _mm512_storeu_si512(to, value); }
  static inline F fma(__m512i a, __m512i b, F c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  template <Mode mode, int part>
  static inline __m512i effective(__m512i raw, const uint8_t* keep, F) {
    if constexpr (mode == Mode::dense) return raw;
    return _mm512_maskz_mov_epi16(bits(keep), raw);
  }
#else
  template <Mode mode, int part>
  static inline F effective(__m512i raw, const uint8_t* keep, F gamma) {
    if constexpr (mode == Mode::dense) return widen<part>(raw);
    const uint32_t kept = bits(keep);
    const __m512 rest = widen<part>(_mm512_maskz_mov_epi16(kept, raw));
    if constexpr (mode == Mode::hard) return rest;
    const __m512 scaled = _mm512_mul_ps(widen<part>(_mm512_maskz_mov_epi16(~kept, raw)), gamma);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(scaled), _mm512_castps_si512(rest)));
  }
#endif

  // Quantised weights: fp16 to fp32, 16 at a time, and 32 inputs of 4 outputs to bf16, of which `take` gets vectors.
  static inline void widen_halves(const uint16_t* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += width) {
      const F value = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
      const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      store(to + i, _mm512_mask_mov_ps(value, nan, fill(__builtin_nanf(""))));  // one that `round` does not carry
    }
  }
  static inline void multiply_fours(const int8_t* from, int64_t count, const float* fours, float* to) {
    const F factor = _mm512_broadcast_f32x4(_mm_loadu_ps(fours));
    for (int64_t i = 0; i < count; i += width)
      store(to + i, _mm512_mul_ps(signed_bytes(reinterpret_cast<const uint8_t*>(from + i)), factor));
  }
#if defined(__AVX512BF16__)
  static constexpr bool fuses = true;  // dequantising and multiplying, in registers
#else
  static constexpr bool fuses = false;
#endif
  template <int zero, bool offset, class Take>
  static inline __attribute__((always_inline)) void four_bits(const uint8_t* codes, const float* scales,
                                                              const float* offsets, const Take& take) {
    const F levels = _mm512_setr_ps(0 - zero, 1 - zero, 2 - zero, 3 - zero, 4 - zero, 5 - zero, 6 - zero, 7 - zero,
                                    8 - zero, 9 - zero, 10 - zero, 11 - zero, 12 - zero, 13 - zero, 14 - zero, 15 - zero);
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++) {
      F values;  // products are exact, fused or not
      if constexpr (offset) values = _mm512_fmadd_ps(levels, fill(scales[m]), fill(offsets[m]));
      else values = _mm512_mul_ps(levels, fill(scales[m]));
      const I table = narrow(values, values);  // twice, as the fifth bit of a place is another output's
      const I places = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + m / 2 * 32)));
      take(m, 0, _mm512_permutexvar_epi16(_mm512_srli_epi16(places, m % 2 * 4), table));
    }
  }
  template <int apart, bool offset, class Take>
  static inline __attribute__((always_inline)) void eight_bits(const uint8_t* codes, const float* scales,
                                                               const float* offsets, const Take& take) {
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++) {
      const auto values = [&](int at) {
        const F levels = signed_bytes(codes + m * 32 + at), scale = fill(scales[m + at / 16 * apart]);
        return offset ? _mm512_fmadd_ps(levels, scale, fill(offsets[m])) : _mm512_mul_ps(levels, scale);
      };
      take(m, 0, narrow(values(0), values(16)));
    }
  }

#if defined(__AVX512VNNI__)
  static constexpr bool rounds = true;
  static constexpr int beside = 2;
  typedef F Partial;
  typedef __m128 Quad;
  template <int bits>
  struct Inputs {  // with signed codes, 128 times the sums are taken away again
    I levels, less = _mm512_setzero_si512();
    explicit Inputs(const int8_t* from)
        : levels(_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))) {
      if constexpr (bits == 8) less = _mm512_sub_epi32(less, _mm512_dpbusd_epi32(less, _mm512_set1_epi8(-128), levels));
    }
  };
  template <int bits>
  struct Codes {
    I levels[2];
    explicit Codes(const uint8_t* from) {
      const I halves = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
      for (int v = 0; v < 2; v++)
        if constexpr (bits == 8) {
          levels[v] = _mm512_xor_si512(_mm512_loadu_si512(from + v * 64), _mm512_set1_epi8(-128));
        } else {
          const I both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + v * 32)));
          levels[v] = _mm512_and_si512(_mm512_srlv_epi16(both, halves), _mm512_set1_epi8(15));
        }
    }
    template <int v>
    F multiply(const Inputs<bits>& inputs) const {
      return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(inputs.less, levels[v], inputs.levels));
    }
  };
  static inline Quad widen_four(const uint16_t* from) {
    return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  static inline Quad widen_four(const int8_t* from) {
    int32_t bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return _mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(bytes)));
  }
  static inline F join(Quad low, Quad high) { return _mm512_castps256_ps512(_mm256_set_m128(high, low)); }
  template <int v>
  static inline F spread(F fours) {
    constexpr int m = 2 * v;
    const I at = _mm512_setr_epi32(m, m, m, m, m + 4, m + 4, m + 4, m + 4, m + 1, m + 1, m + 1, m + 1, m + 5, m + 5,
                                   m + 5, m + 5);
    return _mm512_permutexvar_ps(at, fours);
  }
  static inline void reduce(F ab, F cd, float* to) {  // in lanes8.h's tree
    const auto fold = [](__m256 v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); };
    const auto pairs = [&](F v) { return _mm_hadd_ps(fold(_mm512_castps512_ps256(v)), fold(_mm512_extractf32x8_ps(v, 1))); };
    _mm_storeu_ps(to, _mm_hadd_ps(pairs(ab), pairs(cd)));
  }
#else
  static constexpr bool rounds = false;
#endif

  // Lists: how many weights the lanes have, which lanes have more than `step`, and inputs from everywhere.
  static inline I count(const uint16_t* counts) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(counts)));
  }
  static inline I count(const uint32_t* counts) { return _mm512_loadu_si512(counts); }
  static inline __mmask16 more(I counts, int32_t step) { return _mm512_cmpgt_epi32_mask(counts, _mm512_set1_epi32(step)); }
  static inline int size(__mmask16 lanes) { return __builtin_popcount(lanes); }
  static inline F fma_where(__mmask16 lanes, F a, F b, F c) { return _mm512_mask3_fmadd_ps(a, b, c, lanes); }
  template <class C>
  static inline F gather(const float* x, const C* at) {
    return _mm512_setr_ps(x[at[0]], x[at[1]], x[at[2]], x[at[3]], x[at[4]], x[at[5]], x[at[6]], x[at[7]], x[at[8]],
                          x[at[9]], x[at[10]], x[at[11]], x[at[12]], x[at[13]], x[at[14]], x[at[15]]);
  }
  template <class C>
  static inline F gather(const uint16_t* x, const C* at) {  // one by one: the compiler's way of doing so runs out of registers
    __m128i low = _mm_setzero_si128(), high = low;
#define INSERT(lane)                                  \
  low = _mm_insert_epi16(low, x[at[lane]], lane);     \
  high = _mm_insert_epi16(high, x[at[lane + 8]], lane);
    INSERT(0) INSERT(1) INSERT(2) INSERT(3) INSERT(4) INSERT(5) INSERT(6) INSERT(7)
#undef INSERT
    return widen(_mm256_set_m128i(high, low));
  }
  // 64 floats by their places among 64.
  static inline void look_up(const float* from, const uint8_t* places, float* to) {
    const F a = load(from), b = load(from + 16), c = load(from + 32), d = load(from + 48);
    for (int i = 0; i < 64; i += 16) {
      const I at = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(places + i)));
      const F low = _mm512_permutex2var_ps(a, at, b), high = _mm512_permutex2var_ps(c, at, d);
      store(to + i, _mm512_mask_mov_ps(low, _mm512_test_epi32_mask(at, _mm512_set1_epi32(32)), high));
    }
  }
  static inline F widen(const float* from) { return _mm512_loadu_ps(from); }
  static inline F widen(const uint16_t* from) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }

  template <int part>
  static inline F line(const float* from) { return _mm512_loadu_ps(from); }
  template <int part>
  static inline F line(const uint16_t* from) { return widen<part>(_mm512_loadu_si512(from)); }

 private:
  static inline uint32_t bits(const uint8_t* keep) {
    uint32_t kept;
    std::memcpy(&kept, keep, sizeof kept);
    return kept;
  }
  static inline F signed_bytes(const uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
#if defined(__AVX512BF16__)
  static inline I narrow(F low, F high) { return reinterpret_cast<I>(_mm512_cvtne2ps_pbh(high, low)); }
#else
  static inline I narrow(F low, F high) {
    const I odd = _mm512_setr_epi32(0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d, 0x230021,
                                    0x270025, 0x2b0029, 0x2f002d, 0x330031, 0x370035, 0x3b0039, 0x3f003d);
    return _mm512_permutex2var_epi16(round(low), odd, round(high));
  }
  static inline I round(F value) {  // to bf16, in the high half; ties to even
    const I bits = _mm512_castps_si512(value), one = _mm512_set1_epi32(1);
    const I last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
  }
#endif
  static inline F widen(__m256i value) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(value), 16));
  }
  template <int part>
  static inline F widen(__m512i value) {
    if constexpr (part == 0) return _mm512_castsi512_ps(_mm512_slli_epi32(value, 16));
    return _mm512_castsi512_ps(_mm512_and_si512(value, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static inline __m128 fold(__m512 v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
};

}  // namespace
