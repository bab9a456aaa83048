// What a decoder layer does to its rows between the products, rounded where transformers rounds. Everything is computed
// in fp32, element by element; a sum of squares is taken in double, in one order for all instruction sets.
#pragma once
#include <cmath>

#include "attention.h"

namespace {

constexpr int kSquares = 16;  // squares that are added at once

template <class T>
inline float rounded(float value) {
  T bits;
  narrow(value, &bits);
  return widen(bits);
}

// RMSNorm: each row over the root of its mean square, times the weight.
template <class T>
void normalize(const void* from, const void* weights, void* to, int64_t rows, int64_t size, float eps) {
  const T *x = static_cast<const T*>(from), *weight = static_cast<const T*>(weights);
  T* y = static_cast<T*>(to);
  for (int64_t row = 0; row < rows; row++, x += size, y += size) {
    double total[kSquares] = {}, sum = 0;
    const auto square = [&](int64_t k, int i) {
      const double value = widen(x[k + i]);
      total[i] += value * value;
    };
    int64_t k = 0;
    for (; k + kSquares <= size; k += kSquares)
      for (int i = 0; i < kSquares; i++) square(k, i);
    for (int i = 0; k + i < size; i++) square(k, i);
    for (const double part : total) sum += part;
    const float scale = 1.0f / std::sqrt(static_cast<float>(sum / size) + eps);
    for (int64_t i = 0; i < size; i++) narrow(widen(weight[i]) * rounded<T>(widen(x[i]) * scale), y + i);
  }
}

// Rotary positions of heads [rows, heads, size], in place; cosines and sines are [rows, size].
template <class T>
void rotate(void* heads, const void* cosines, const void* sines, int64_t rows, int64_t count, int64_t size) {
  T* x = static_cast<T*>(heads);
  const T *cos = static_cast<const T*>(cosines), *sin = static_cast<const T*>(sines);
  const int64_t half = size / 2;
  for (int64_t row = 0; row < rows; row++, cos += size, sin += size)
    for (int64_t head = 0; head < count; head++, x += size)
      for (int64_t i = 0; i < half; i++) {
        const float a = widen(x[i]), b = widen(x[i + half]);
        narrow(rounded<T>(a * widen(cos[i])) + rounded<T>(-b * widen(sin[i])), x + i);
        narrow(rounded<T>(b * widen(cos[i + half])) + rounded<T>(a * widen(sin[i + half])), x + i + half);
      }
}

// gate = silu(gate) * up.
template <class T>
void multiply_gate(void* gates, const void* ups, int64_t count) {
  T* gate = static_cast<T*>(gates);
  const T* up = static_cast<const T*>(ups);
  for (int64_t i = 0; i < count; i++) {
    const float x = widen(gate[i]), power = exponential(-std::fabs(x));  // so that nothing overflows
    narrow(rounded<T>(x * (x < 0.0f ? power : 1.0f) / (1.0f + power)) * widen(up[i]), gate + i);
  }
}

// y = x + scale * added.
template <class T>
void add(const void* rows, const void* others, void* to, float scale, int64_t count) {
  const T *x = static_cast<const T*>(rows), *added = static_cast<const T*>(others);
  T* y = static_cast<T*>(to);
  for (int64_t i = 0; i < count; i++) narrow(widen(x[i]) + rounded<T>(widen(added[i]) * scale), y + i);
}

template <class T>
constexpr RowKernels kRows = {normalize<T>, rotate<T>, multiply_gate<T>, add<T>};

inline RowKernels rows_of(int32_t dtype) { return dtype == kFloat32 ? kRows<T32> : kRows<T16>; }

}  // namespace
