// Sixteen fp32 lanes of AVX-512. Keep bits are mask registers as they lie in memory. See lanes8.h for the interface.
//
// A unit built for AVX512_BF16 takes bf16 inputs as they are, 32 products an instruction. That instruction takes denormals
// for zeros. Weights cannot be scaled there, so soft masks are blended from the dense and the hard product.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

enum class Mode { dense, hard, soft };

struct Lanes {
  typedef __m512 F;
  typedef float Octet __attribute__((vector_size(32)));
  typedef int32_t Octet32 __attribute__((vector_size(32)));

  static constexpr int width = 16;
  template <class T>
#if defined(__AVX512BF16__)
  static constexpr int parts = 1;
  template <class T>
  using Input = T;
#else
  static constexpr int parts = sizeof(T) == 4 ? 1 : 2;
  template <class T>
  using Input = float;
#endif
  template <class T>
  static constexpr int step = sizeof(T) == 4 ? 16 : 32;
  static constexpr int rows = 6;  // 4 x 6 accumulators of 32 registers

  static inline F load(const float* from) { return _mm512_loadu_ps(from); }
  static inline void store(float* to, F value) { _mm512_storeu_ps(to, value); }
  static inline F fill(float value) { return _mm512_set1_ps(value); }
  static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static inline Octet fma(Octet a, Octet b, Octet c) { return _mm256_fmadd_ps(a, b, c); }
  static inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

  static inline void reduce(F a, F b, F c, F d, float* to) {
    _mm_storeu_ps(to, _mm_hadd_ps(_mm_hadd_ps(fold(a), fold(b)), _mm_hadd_ps(fold(c), fold(d))));
  }

  static inline void reduce(Octet a, Octet b, Octet c, Octet d, float* to) {
    _mm_storeu_ps(to, _mm_hadd_ps(_mm_hadd_ps(fold(a), fold(b)), _mm_hadd_ps(fold(c), fold(d))));
  }

  template <class C>
  static inline Octet gather(const float* from, const C* at) {
    return Octet{from[at[0]], from[at[1]], from[at[2]], from[at[3]], from[at[4]], from[at[5]], from[at[6]], from[at[7]]};
  }
  template <class C>
  static inline Octet gather(const uint16_t* from, const C* at) {
    typedef uint16_t Half __attribute__((vector_size(16)));
    typedef uint32_t U __attribute__((vector_size(32)));
    const Half found{from[at[0]], from[at[1]], from[at[2]], from[at[3]], from[at[4]], from[at[5]], from[at[6]], from[at[7]]};
    return (Octet)(__builtin_convertvector(found, U) << 16);
  }

  template <Mode mode, int part>
  static inline F weight(const float* from, const uint8_t* keep, F gamma) {
    if constexpr (mode == Mode::dense) return _mm512_loadu_ps(from);
    uint16_t kept;
    std::memcpy(&kept, keep, sizeof kept);
    if constexpr (mode == Mode::hard) return _mm512_maskz_loadu_ps(kept, from);
    const F value = _mm512_loadu_ps(from);
    return _mm512_mask_mul_ps(value, static_cast<__mmask16>(~kept), value, gamma);
  }

#if defined(__AVX512BF16__)
  static inline __m512i load(const uint16_t* from) { return _mm512_loadu_si512(from); }
  static inline void store(uint16_t* to, __m512i value) { _mm512_storeu_si512(to, value); }
  static inline F fma(__m512i a, __m512i b, F c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  template <Mode mode, int part>
  static inline __m512i weight(const uint16_t* from, const uint8_t* keep, F) {
    if constexpr (mode == Mode::dense) return _mm512_loadu_si512(from);
    uint32_t kept;
    std::memcpy(&kept, keep, sizeof kept);
    return _mm512_maskz_loadu_epi16(kept, from);
  }
#else
  template <Mode mode, int part>
  static inline F weight(const uint16_t* from, const uint8_t* keep, F gamma) {
    if constexpr (mode == Mode::dense) return widen<part>(_mm512_loadu_si512(from));
    uint32_t kept;
    std::memcpy(&kept, keep, sizeof kept);
    if constexpr (mode == Mode::hard) return widen<part>(_mm512_maskz_loadu_epi16(kept, from));
    const __m512i pruned = _mm512_maskz_loadu_epi16(~kept, from), rest = _mm512_maskz_loadu_epi16(kept, from);
    const __m512 scaled = _mm512_mul_ps(widen<part>(pruned), gamma);
    return _mm512_castsi512_ps(
        _mm512_or_si512(_mm512_castps_si512(scaled), _mm512_castps_si512(widen<part>(rest))));
  }
#endif

 private:
  template <int part>
  static inline F widen(__m512i value) {
    if constexpr (part == 0) return _mm512_castsi512_ps(_mm512_slli_epi32(value, 16));
    return _mm512_castsi512_ps(_mm512_and_si512(value, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static inline __m128 fold(__m256 v) {
    return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  }
  static inline __m128 fold(__m512 v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
};

}  // namespace
