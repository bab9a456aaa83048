// Products of bf16 by AMX: a register is a matrix of 16 lines, each of 32 bf16 or 16 fp32.
//
// A product of registers takes 32 inputs and adds to the sums of 16 outputs and 16 rows: those of the even inputs, in
// their order, and of the odd ones, then both. Either operand may have the weights, so the order of a sum is always the
// same. Few rows multiply weights as they lie in memory, and their sums come out output by output. For many rows the
// weights are turned, once for all of them, and sums come out row by row.
#pragma once
#include <immintrin.h>

#include <vector>

#include "lists.h"

namespace {

constexpr int64_t kEdge = 16;              // lines of a register, and fp32 of a line
constexpr int64_t kDeep = 32;              // inputs of a register
constexpr int64_t kRegister = kEdge * kDeep;
constexpr int64_t kStrip = 2 * kEdge;      // outputs of a strip, and rows: what two registers have
constexpr int64_t kTurned = 48;            // from so many rows of a mask on, weights are turned
constexpr int64_t kBandRows = 512;         // rows whose inputs stay in the second cache

inline int64_t count_steps(int64_t in) { return (in + kDeep - 1) / kDeep; }

// Registers in memory, two of them beside each other.
struct Operand {
  const T16* at;
  int64_t line;   // bytes from a line to the next
  int64_t step;   // elements from a register to that of the next inputs
  int64_t apart;  // elements between the two
};

// sums [16 left, 16 right] = a bᵀ, or are added to, where the lines of b have its inputs in pairs: those of 16 columns.
template <int left, int right, bool adds = false>
void multiply_registers(const Operand& a, const Operand& b, int64_t steps,
                                                              Ahead& ahead_, float* sums, int64_t stride) {
  Ahead ahead = ahead_;
  asm volatile("" ::: "memory");  // the operands have been written
  static_assert(!adds || (left == 1 && right == 1));
  if constexpr (adds) _tile_loadd(0, sums, stride * sizeof(float));
  else _tile_zero(0);
  if constexpr (right > 1) _tile_zero(1);
  if constexpr (left > 1) _tile_zero(2);
  if constexpr (left > 1 && right > 1) _tile_zero(3);
  const T16 *first = a.at, *second = b.at;
  for (int64_t step = 0; step < steps; step++, first += a.step, second += b.step) {
    ahead.fetch();
    _tile_loadd(4, first, a.line);
    _tile_loadd(6, second, b.line);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (right > 1) {
      _tile_loadd(7, second + b.apart, b.line);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (left > 1) {
      _tile_loadd(5, first + a.apart, a.line);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (left > 1 && right > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, stride * sizeof(float));
  if constexpr (right > 1) _tile_stored(1, sums + kEdge, stride * sizeof(float));
  if constexpr (left > 1) _tile_stored(2, sums + kEdge * stride, stride * sizeof(float));
  if constexpr (left > 1 && right > 1) _tile_stored(3, sums + kEdge * stride + kEdge, stride * sizeof(float));
  asm volatile("" ::: "memory");
  ahead_ = ahead;
}

// Turns a matrix of 16 x 16 elements of 32 bits: `line(i)` is a line of it, `take(i, line)` gets one of the result.
template <class Line, class Take>
inline __attribute__((always_inline)) void turn(const Line& line, const Take& take) {
  __m512i a[kEdge], b[kEdge];
#pragma GCC unroll 16
  for (int i = 0; i < kEdge; i++) a[i] = line(i);
#pragma GCC unroll 8
  for (int i = 0; i < kEdge; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kEdge; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      b[8 * j + i] = _mm512_shuffle_i32x4(a[8 * j + i], a[8 * j + 4 + i], 0x88);
      b[8 * j + 4 + i] = _mm512_shuffle_i32x4(a[8 * j + i], a[8 * j + 4 + i], 0xdd);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      take(4 * j + i, _mm512_shuffle_i32x4(b[4 * j + i], b[8 + 4 * j + i], 0x88));
      take(8 + 4 * j + i, _mm512_shuffle_i32x4(b[4 * j + i], b[8 + 4 * j + i], 0xdd));
    }
}

// 32 inputs of an output as a mask has them; beyond the last input zeros.
template <Mode mode>
inline __attribute__((always_inline)) __m512i effective(const Job<T16>& job, const uint8_t* keep, int64_t output, int64_t k) {
  const int64_t rest = job.call.in - k;
  const __mmask32 within = rest < kDeep ? (1u << rest) - 1 : ~0u;
  const __m512i raw = _mm512_maskz_loadu_epi16(within, job.weight(output) + k);
  const uint8_t* bits = mode == Mode::dense ? nullptr : keep + output * job.keep_stride() + k / 8;
  return Lanes::effective<mode, 0>(raw, bits, F{});
}

// Effective weights of outputs `first` to `last` as registers [register, step], turned or not; lines beyond the last
// output are that output's.
template <Mode mode, bool turned>
void unpack_registers(const Job<T16>& job, const Piece& piece, int64_t first, int64_t last, Ahead& ahead, T16* to) {
  const int64_t steps = count_steps(job.call.in);
  for (; first < last; first += kEdge)
    for (int64_t step = 0; step < steps; step++, to += kRegister) {
      ahead.fetch();
      const auto line = [&](int64_t i) __attribute__((always_inline)) {
        return effective<mode>(job, piece.keep, std::min(first + i, last - 1), step * kDeep);
      };
      const auto take = [&](int64_t i, __m512i values) __attribute__((always_inline)) {
        _mm512_store_si512(to + i * kDeep, values);
      };
      if constexpr (turned)
        turn(line, take);
      else
        for (int64_t i = 0; i < kEdge; i++) take(i, line(i));
    }
}

template <bool turned>
void unpack_registers(const Job<T16>& job, const Piece& piece, int64_t first, int64_t last, Ahead& ahead, T16* to) {
  (piece.mode == Mode::dense ? unpack_registers<Mode::dense, turned> : unpack_registers<Mode::hard, turned>)(
      job, piece, first, last, ahead, to);
}

// 16 rows as registers [steps], in pairs.
inline void turn_rows(const T16* rows, int64_t stride, int64_t steps, T16* to) {
  for (int64_t step = 0; step < steps; step++, rows += kDeep, to += kRegister)
    turn([&](int64_t i) { return _mm512_loadu_si512(rows + i * stride); },
         [&](int64_t i, __m512i pairs) { _mm512_store_si512(to + i * kDeep, pairs); });
}

inline bool has_few_rows(const Piece& piece) { return piece.stop - piece.start < kTurned; }

// Inputs of pieces with few rows as registers [rows / 16, step]. Lines beyond the last row are anything.
inline void turn_inputs(const Job<T16>& job) {
  const int64_t steps = count_steps(job.call.in);
  int64_t row = 0;
  for (const Piece& piece : job.products)
    if (has_few_rows(piece))
      for (row = std::max(row, piece.start / kEdge * kEdge); row < piece.stop; row += kEdge)
        turn_rows(job.inputs.x + row * job.inputs.stride, job.inputs.stride, steps, job.turned + row / kEdge * steps * kRegister);
}

// Copies the sums of some rows, [kStrip, kStrip] output by output, to their stage.
inline void turn_sums(const float* corner, int64_t row, int64_t count, bool whole, int64_t first, const Stage& stage) {
  for (int64_t half = 0; half < kStrip; half += kEdge) {
    float* to = stage.of(whole, row, first + half);
    if (count <= 4) {
      for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < kEdge; i++) to[r * kRow + i] = corner[(half + i) * kStrip + r];
      continue;
    }
    turn([&](int64_t i) { return _mm512_loadu_si512(corner + (half + i) * kStrip); },
         [&](int64_t i, __m512i sums) {
           if (i < count) _mm512_storeu_si512(to + i * kRow, sums);
         });
  }
}

// The strip that begins at an output, for the few rows of a piece; its weights come from memory, and `ahead` fetches.
inline void multiply_strip(const Job<T16>& job, const Piece& piece, int64_t first, const Stage& stage, Ahead& ahead,
                           T16* room, float* corner) {
  const int64_t in = job.call.in, steps = count_steps(in), last = std::min(first + kStrip, stage.last);
  const bool direct = piece.mode == Mode::dense && last - first == kStrip && in % kDeep == 0;
  Operand weights{room, kCacheLine, kRegister, last - first > kEdge ? steps * kRegister : 0};
  if (direct)
    weights = {job.weight(first), in * static_cast<int64_t>(sizeof(T16)), kDeep, kEdge * in};
  else
    unpack_registers<false>(job, piece, first, last, ahead, room);
  for (int64_t row = piece.start, end; row < piece.stop; row = end) {
    const int64_t group = row / kEdge, beyond = (group + 1) * kEdge;
    end = std::min(piece.stop, beyond + kEdge);
    const Operand inputs{job.turned + group * steps * kRegister, kCacheLine, kRegister, steps * kRegister};
    (end > beyond ? multiply_registers<2, 2> : multiply_registers<2, 1>)(weights, inputs, steps, ahead, corner, kStrip);
    const int64_t own = std::min(end, beyond);
    turn_sums(corner + row % kEdge, row, own - row, piece.whole, first, stage);
    if (end > own) turn_sums(corner + kEdge, own, end - own, piece.whole, first, stage);
  }
}

// A stage's outputs for the many rows of a piece.
inline void multiply_turned(const Job<T16>& job, const Piece& piece, const Stage& stage, T16* room, float* corner) {
  const int64_t steps = count_steps(job.call.in), stride = job.inputs.stride, rows = piece.stop - piece.start;
  const int64_t registers = (stage.last - stage.first + kEdge - 1) / kEdge;
  Ahead nothing(nullptr, 0, 1), ahead(job.memory(stage.last), kBlock / kTile * job.tile_bytes(), std::max(int64_t{1}, rows / kStrip * registers / 2) * steps);
  unpack_registers<true>(job, piece, stage.first, stage.last, nothing, room);
  for (int64_t row = 0; row < rows; row += kStrip) {
    const int64_t count = std::min(kStrip, rows - row), line = stride * static_cast<int64_t>(sizeof(T16));
    const Operand inputs{job.inputs.x + (piece.start + row) * stride, line, kDeep, kEdge * stride};
    for (int64_t at = 0; at < registers; at += 2) {
      const Operand weights{room + at * steps * kRegister, kCacheLine, kRegister, steps * kRegister};
      float* const to = stage.of(piece.whole, piece.start + row, stage.first + at * kEdge);
      float* const sums = count < kStrip ? corner : to;
      const bool tall = count > kEdge, wide = at + 1 < registers;
      (tall ? wide ? multiply_registers<2, 2> : multiply_registers<2, 1>
            : wide ? multiply_registers<1, 2> : multiply_registers<1, 1>)(inputs, weights, steps, ahead, sums,
                                                                          count < kStrip ? kStrip : kRow);
      if (count < kStrip)
        for (int64_t r = 0; r < count; r++)
          std::memcpy(to + r * kRow, sums + r * kStrip, (wide ? kStrip : kEdge) * sizeof(float));
    }
  }
}

// A stage's outputs for all pieces; `room` is for the weights of a block, and `corner` for [kStrip, kStrip] sums.
inline void multiply_matrices(const Job<T16>& job, const Stage& stage, T16* room, float* corner) {
  const Listed<T16>* const lists = job.listed.begin();
  const int64_t steps = count_steps(job.call.in), count = job.listed.size(), strips = kBlock / kStrip;
  for (int64_t strip = 0; strip < strips; strip++) {
    const int64_t first = stage.first + strip * kStrip;
    fetch_lists<false>(job, stage, lists + count * strip / strips, lists + count * (strip + 1) / strips);
    Ahead ahead(job.memory(first + kStrip), kStrip / kTile * job.tile_bytes(), steps);
    for (const Piece& piece : job.products)
      if (has_few_rows(piece) && first < stage.last) multiply_strip(job, piece, first, stage, ahead, room, corner);
  }
  for (const Piece& piece : job.products)
    if (!has_few_rows(piece)) multiply_turned(job, piece, stage, room, corner);
}

// Calls `multiply` for so many rows at a time that their inputs stay in the second cache.
template <class Multiply>
void in_bands(const Call& call, const Multiply& multiply) {
  static thread_local std::vector<Group> groups;
  const int64_t bands = (call.rows + kBandRows - 1) / kBandRows;
  const Group* const last = call.groups + call.group_count;
  if (bands == 1 || call.form != kPlain) return multiply(call);
  int64_t base_rows = call.rows;
  for (const Group* group = call.groups; group < last; group++) base_rows -= group->rows;
  for (int64_t band = 0; band < bands; band++) {
    const int64_t start = call.rows * band / bands, stop = call.rows * (band + 1) / bands;
    Call part = call;
    part.rows = stop - start;
    if (call.order) {
      part.order = call.order + start;
    } else {
      part.x = static_cast<const T16*>(call.x) + start * call.in;
      part.y = static_cast<T16*>(call.y) + start * call.out;
    }
    groups.clear();
    int64_t at = base_rows;
    for (const Group* group = call.groups; group < last; at += group->rows, group++) {
      const int64_t rows = std::min(stop, at + group->rows) - std::max(start, at);
      if (rows > 0) groups.push_back({group->part, group->strength, rows});
    }
    part.groups = groups.data();
    part.group_count = static_cast<int64_t>(groups.size());
    multiply(part);
  }
}

}  // namespace
