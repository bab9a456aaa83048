// Attention by AMX: scores and sums are products of matrix registers, of 16 queries that share keys and values.
//
// Weights are rounded to bf16 before they are multiplied with values, as in torch. As in attention.h a query's result
// depends on nothing but the query: positions are taken in their order, kBlock of them at a time.
#pragma once
#include "amx.h"
#include "attention.h"

namespace {

constexpr int64_t kWeights = kBlock / kDeep;  // registers of a query's weights

class MatrixAttention : Attention<T16> {
 public:
  using Attention<T16>::Attention;

  void run() {
    static thread_local Scratch scratch;
    const Lanes::Registers registers;
    const int64_t size = call_.size, queries = share_.stop - share_.start, parts = (queries + kEdge - 1) / kEdge;
    const int64_t inputs = count_steps(size) * kRegister, stride = round_up(size, kDeep) + kPad<T16>;
    const int64_t elements = parts * (kEdge * stride + inputs) + kBlock * (stride + size + kEdge);
    const int64_t floats = kEdge * (parts * size + kRow + kStrip);
    scratch.reserve(elements * sizeof(T16) + floats * sizeof(float) + parts * sizeof(Queries<T16>), 9);
    T16 *x = scratch.take<T16>(parts * kEdge * stride), *turned = scratch.take<T16>(parts * inputs);
    keys_ = scratch.take<T16>(kBlock * stride);
    values_ = scratch.take<T16>(kBlock * size);
    weights_ = scratch.take<T16>(kEdge * kBlock);
    float* sums = scratch.take<float>(parts * kEdge * size);
    scores_ = scratch.take<float>(kEdge * kRow);
    corner_ = scratch.take<float>(kStrip * kEdge);
    Queries<T16>* passes = scratch.take<Queries<T16>>(parts);
    for (int64_t part = 0; part < parts; part++) {
      const int64_t start = part * kEdge, count = std::min(queries - start, kEdge);
      passes[part] = {{x + start * stride, stride}, static_cast<int>(count), sums + start * size, {}, {}, {}};
      begin(passes[part], share_.start + start);
      turn_rows(passes[part].inputs.x, stride, count_steps(size), turned + part * inputs);
    }
    const int64_t longest = passes[parts - 1].longest();
    for (int64_t first = 0; first < longest; first += kBlock) {
      pair_values(first, std::min(longest, first + kBlock), parts == 1 ? longest : 0);
      for (int64_t part = 0; part < parts; part++)
        if (first < passes[part].longest()) pass_over(passes[part], turned + part * inputs, first);
    }
    for (int64_t part = 0; part < parts; part++) finish(passes[part], share_.start + part * kEdge);
  }

 private:
  const T16* find(const void* cache, int64_t position) const {
    return block(cache, position) + position % call_.positions * call_.size;
  }
  void fetch(const T16* row) const {
    for (int64_t at = 0; at < call_.size; at += kCacheLine / sizeof(T16)) __builtin_prefetch(row + at, 0, 2);
  }

  // The keys of 16 positions, size apart: as they lie in the cache, or a copy where they are not together or end within
  // a register.
  const T16* keys_of(int64_t position, int64_t* line) const {
    const int64_t size = call_.size, whole = round_up(size, kDeep);
    *line = size * sizeof(T16);
    if (size == whole && call_.positions % kEdge == 0) return find(call_.keys, position);
    *line = whole * sizeof(T16);
    T16* copy = keys_ + position % kBlock * whole;
    const int64_t last = call_.lengths[share_.chunk] - 1;
    for (int64_t i = 0; i < kEdge; i++) {  // a position beyond the last one is that one: nobody reads its score
      const int64_t at = std::min(position + i, last);
      std::memcpy(copy + i * whole, find(call_.keys, at), size * sizeof(T16));
      std::fill(copy + i * whole + size, copy + (i + 1) * whole, T16{});
    }
    return copy;
  }

  // Values of some positions as registers [16 of a value, 32 positions], in pairs of positions; zeros beyond the last.
  // Keys and values of the next kBlock positions, up to `fetched`, come nearer meanwhile.
  void pair_values(int64_t first, int64_t stop, int64_t fetched) const {
    const __m512i pairs = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const int64_t size = call_.size;
    for (int64_t pair = 0; pair < kBlock; pair += 2) {
      const T16* values[2];
      for (int64_t i = 0; i < 2; i++) {
        const int64_t at = first + pair + i;
        values[i] = at < stop ? find(call_.values, at) : nullptr;
        if (at + kBlock < fetched)
          for (const void* cache : {call_.keys, call_.values}) fetch(find(cache, at + kBlock));
      }
      for (int64_t k = 0; k < size; k += kEdge) {
        const auto half = [&](const T16* from) {
          const __m256i some = from ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k)) : __m256i{};
          return _mm512_castsi256_si512(some);
        };
        T16* to = values_ + (k / kEdge * kWeights + pair / kDeep) * kRegister + pair / 2 % kEdge * kDeep;
        _mm512_store_si512(to, _mm512_permutex2var_epi16(half(values[0]), pairs, half(values[1])));
      }
    }
  }

  void pass_over(Queries<T16>& queries, const T16* turned, int64_t first) const {
    const int64_t size = call_.size, steps = count_steps(size), stop = std::min(queries.longest(), first + kBlock);
    const Operand inputs{turned, kCacheLine, kRegister, 0};
    for (int64_t at = first; at < stop; at += kStrip) {
      int64_t line;
      const T16 *keys = keys_of(at, &line), *more = at + kEdge < stop ? keys_of(at + kEdge, &line) : keys;
      multiply_registers<2, 1>(Operand{keys, line, kDeep, more - keys}, inputs, steps, corner_, kEdge);
      for (int64_t half = 0; half < kStrip; half += kEdge)
        turn([&](int64_t i) { return _mm512_load_si512(corner_ + (half + i) * kEdge); },
             [&](int64_t i, __m512i scores) { _mm512_storeu_si512(scores_ + i * kRow + at - first + half, scores); });
    }
    weigh(queries, call_.scale, first, size, scores_);
    for (int64_t r = 0; r < kEdge; r++)
      for (int64_t i = 0; i < kBlock; i += kDeep) {
        const float* from = scores_ + r * kRow + i;
        const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_load_ps(from + kEdge), _mm512_load_ps(from));
        _mm512_store_si512(weights_ + r * kBlock + i, r < queries.count ? reinterpret_cast<__m512i>(rounded) : __m512i{});
      }
    const Operand weights{weights_, kBlock * sizeof(T16), kDeep, 0};
    for (int64_t k = 0; k < size; k += kEdge) {
      const Operand values{values_ + k * kBlock, kCacheLine, kRegister, 0};
      multiply_registers<1, 1, true>(weights, values, kWeights, queries.sums + k, size);
    }
  }

  T16 *keys_ = nullptr, *values_ = nullptr, *weights_ = nullptr;
  float *scores_ = nullptr, *corner_ = nullptr;
};

}  // namespace
