// What a decoder layer does to its rows between the products, rounded where transformers rounds, and the gradients of
// that. Everything is computed in fp32, element by element; sums are taken in one order for all instruction sets, those of
// squares in double.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "attention.h"

namespace {

constexpr int kParts = 16;  // of a sum, which are added to at once

template <class T>
inline float rounded(float value) {
  T bits;
  narrow(value, &bits);
  return widen(bits);
}

// The sum of `get(i)` for i < count.
template <class Sum, class Get>
inline Sum sum_up(int64_t count, const Get& get) {
  Sum parts[kParts] = {}, sum = 0;
  int64_t k = 0;
  for (; k + kParts <= count; k += kParts)
    for (int i = 0; i < kParts; i++) parts[i] += get(k + i);
  for (int i = 0; k + i < count; i++) parts[i] += get(k + i);
  for (const Sum part : parts) sum += part;
  return sum;
}

template <class T>
inline float find_scale(const T* x, int64_t size, float eps) {
  const double sum = sum_up<double>(size, [&](int64_t i) {
    const double value = widen(x[i]);
    return value * value;
  });
  return 1.0f / std::sqrt(static_cast<float>(sum / size) + eps);
}

// RMSNorm: each row over the root of its mean square, times the weight.
template <class T>
void normalize(const void* from, const void* weights, void* to, int64_t rows, int64_t size, float eps) {
  const T *x = static_cast<const T*>(from), *weight = static_cast<const T*>(weights);
  T* y = static_cast<T*>(to);
  for (int64_t row = 0; row < rows; row++, x += size, y += size) {
    const float scale = find_scale(x, size, eps);
    for (int64_t i = 0; i < size; i++) narrow(widen(weight[i]) * rounded<T>(widen(x[i]) * scale), y + i);
  }
}

// The gradient of x from that of the norm, `above`.
template <class T>
void normalize_back(const void* from, const void* weights, const void* above, void* to, int64_t rows, int64_t size,
                    float eps) {
  const T *x = static_cast<const T*>(from), *weight = static_cast<const T*>(weights), *dy = static_cast<const T*>(above);
  T* dx = static_cast<T*>(to);
  for (int64_t row = 0; row < rows; row++, x += size, dy += size, dx += size) {
    const float scale = find_scale(x, size, eps);
    const float along = sum_up<float>(size, [&](int64_t i) { return widen(weight[i]) * widen(dy[i]) * widen(x[i]); });
    const float part = along * scale * scale / size;
    for (int64_t i = 0; i < size; i++) narrow(scale * (widen(weight[i]) * widen(dy[i]) - widen(x[i]) * part), dx + i);
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

// 1 / (1 + exp(-x)), without an overflow.
inline float sigmoid(float x) {
  const float power = exponential(-std::fabs(x));
  return (x < 0.0f ? power : 1.0f) / (1.0f + power);
}

// y = silu(gate) * up; y may be the gate.
template <class T>
void multiply_gate(const void* gates, const void* ups, void* to, int64_t count) {
  const T *gate = static_cast<const T*>(gates), *up = static_cast<const T*>(ups);
  T* y = static_cast<T*>(to);
  for (int64_t i = 0; i < count; i++) {
    const float x = widen(gate[i]), power = exponential(-std::fabs(x));  // so that nothing overflows
    narrow(rounded<T>(x * (x < 0.0f ? power : 1.0f) / (1.0f + power)) * widen(up[i]), y + i);
  }
}

// The gradients of gate and up from that of their product.
template <class T>
void multiply_gate_back(const void* gates, const void* ups, const void* above, void* to_gate, void* to_up, int64_t count) {
  const T *gate = static_cast<const T*>(gates), *up = static_cast<const T*>(ups), *dy = static_cast<const T*>(above);
  T *dgate = static_cast<T*>(to_gate), *dup = static_cast<T*>(to_up);
  for (int64_t i = 0; i < count; i++) {
    const float x = widen(gate[i]), share = sigmoid(x), value = widen(dy[i]);
    narrow(value * (x * share), dup + i);
    narrow(value * widen(up[i]) * (share * (1.0f + x * (1.0f - share))), dgate + i);
  }
}

// Softmax of scores times `scale` over the positions that a query sees; the others get 0. In place: scores and `seen` are
// [queries, positions].
template <class T>
void softmax(void* values, const uint8_t* seen, int64_t queries, int64_t positions, float scale) {
  static thread_local std::vector<float> room;
  room.resize(positions);
  float* const x = room.data();
  T* scores = static_cast<T*>(values);
  for (int64_t i = 0; i < queries; i++, scores += positions, seen += positions) {
    constexpr float kUnseen = -1e30f;
    float largest[kParts], most = kUnseen;
    std::fill(largest, largest + kParts, kUnseen);
    for (int64_t k = 0; k < positions; k++) x[k] = seen[k] ? widen(scores[k]) * scale : kUnseen;
    int64_t k = 0;
    for (; k + kParts <= positions; k += kParts)
      for (int j = 0; j < kParts; j++) largest[j] = largest[j] < x[k + j] ? x[k + j] : largest[j];
    for (; k < positions; k++) most = std::max(most, x[k]);
    for (const float part : largest) most = std::max(most, part);
    for (k = 0; k < positions; k++) x[k] = x[k] == kUnseen ? 0.0f : exponential(x[k] - most);
    const float sum = sum_up<float>(positions, [&](int64_t at) { return x[at]; }), share = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (k = 0; k < positions; k++) narrow(x[k] * share, scores + k);
  }
}

// The gradient of scores from that of their softmax, in its place; [rows, positions].
template <class T>
void softmax_back(const void* values, void* above, int64_t rows, int64_t positions, float scale) {
  const T* shares = static_cast<const T*>(values);
  T* to = static_cast<T*>(above);
  for (int64_t row = 0; row < rows; row++, shares += positions, to += positions) {
    const float mean = sum_up<float>(positions, [&](int64_t k) { return widen(shares[k]) * widen(to[k]); });
    for (int64_t k = 0; k < positions; k++) narrow(scale * widen(shares[k]) * (widen(to[k]) - mean), to + k);
  }
}

// sums += a * b.
template <class T>
void add_products(const void* left, const void* right, float* sums, int64_t count) {
  const T *a = static_cast<const T*>(left), *b = static_cast<const T*>(right);
  for (int64_t i = 0; i < count; i++) sums[i] += widen(a[i]) * widen(b[i]);
}

// y = x + scale * added.
template <class T>
void add(const void* rows, const void* others, void* to, float scale, int64_t count) {
  const T *x = static_cast<const T*>(rows), *added = static_cast<const T*>(others);
  T* y = static_cast<T*>(to);
  for (int64_t i = 0; i < count; i++) narrow(widen(x[i]) + rounded<T>(widen(added[i]) * scale), y + i);
}

template <class T>
constexpr RowKernels kRows = {normalize<T>, normalize_back<T>, rotate<T>,       multiply_gate<T>, multiply_gate_back<T>,
                              add<T>,       softmax<T>,        softmax_back<T>, add_products<T>};

inline RowKernels rows_of(int32_t dtype) { return dtype == kFloat32 ? kRows<T32> : kRows<T16>; }

}  // namespace
