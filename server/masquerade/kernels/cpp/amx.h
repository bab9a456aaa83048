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

constexpr int64_t kEdge = 16;  // lines of a register, and fp32 of a line
constexpr int64_t kDeep = 32;  // inputs of a register: a step
constexpr int64_t kRegister = kEdge * kDeep;
constexpr int64_t kStrip = 2 * kEdge;  // outputs, or rows, that two registers have
constexpr int64_t kUnpacked = 8;       // steps whose effective weights are unpacked at once
constexpr int64_t kRoom = 2 * kUnpacked * kRegister;  // elements of a strip that is unpacked
constexpr int64_t kFewRows = 128;   // of a piece: up to so many multiply weights as they lie in memory
constexpr int64_t kBandRows = 512;  // rows whose inputs stay in the second cache

inline int64_t count_steps(int64_t in) { return (in + kDeep - 1) / kDeep; }

// Registers in memory, two of them beside each other, of one step of inputs after the other.
struct Operand {
  const T16* at;
  int64_t line;   // bytes from a line to the next
  int64_t step;   // elements from a register to that of the next inputs
  int64_t apart;  // elements between the two

  const T16* operator()(int64_t number) const { return at + number * step; }
};

// The same, while something comes nearer.
struct Fetching : Operand {
  Ahead& ahead;

  Fetching(const Operand& operand, Ahead& ahead) : Operand(operand), ahead(ahead) {}
  const T16* operator()(int64_t number) const {
    ahead.fetch();
    return Operand::operator()(number);
  }
};

// sums [16 left, 16 right] = a bᵀ, or are added to, where the lines of b have its inputs in pairs: those of 16 columns.
template <int left, int right, bool adds = false, class A>
inline __attribute__((always_inline)) void multiply_registers(const A& a, const Operand& b, int64_t steps, float* sums,
                                                              int64_t stride) {
  static_assert(!adds || (left == 1 && right == 1));
  asm volatile("" ::: "memory");  // the operands have been written
  if constexpr (adds) _tile_loadd(0, sums, stride * sizeof(float));
  else _tile_zero(0);
  if constexpr (right > 1) _tile_zero(1);
  if constexpr (left > 1) _tile_zero(2);
  if constexpr (left > 1 && right > 1) _tile_zero(3);
  const T16* second = b.at;
  for (int64_t step = 0; step < steps; step++, second += b.step) {
    const T16* first = a(step);
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

// 32 inputs of an output as a mask has them, of which `rest` are left; beyond them zeros.
template <Mode mode>
inline __attribute__((always_inline)) __m512i effective(const T16* weights, const uint8_t* keep, int64_t rest) {
  const __mmask32 within = rest < kDeep ? (1u << rest) - 1 : ~0u;
  return Lanes::effective<mode, 0>(_mm512_maskz_loadu_epi16(within, weights), keep, F{});
}

// Effective weights of a strip, kUnpacked steps at a time, which stay in the first cache. Lines beyond the last output are
// anything, or that output's.
template <Mode mode>
struct Unpacked {
  const Job<T16>& job;
  const uint8_t* keep;
  int64_t first, last;
  T16* room;
  Ahead& ahead;
  static constexpr int64_t line = kCacheLine, apart = kUnpacked * kRegister;

  const T16* operator()(int64_t step) const {
    if (step % kUnpacked == 0) unpack(step * kDeep, std::min((step + kUnpacked) * kDeep, job.call.in));
    ahead.fetch();
    return room + step % kUnpacked * kRegister;
  }

 private:
  void unpack(int64_t start, int64_t stop) const {
    if (job.call.form == kPlain)
      for (int64_t i = 0; i < kStrip; i++) unpack_line(i, start, stop);
    else
      with_form(job.call.form, [&](auto form) { dequantise_tiles<form.value>(start, stop); });
    asm volatile("" ::: "memory");  // what reads it is not known to the compiler
  }
  void unpack_line(int64_t i, int64_t start, int64_t stop) const {
    const T16* from = job.weight(std::min(first + i, last - 1));
    const uint8_t* bits = kept(i);
    if constexpr (mode != Mode::dense)  // those of the next strip
      __builtin_prefetch(bits + kStrip * job.keep_stride() + start / 8, 0, 2);
    T16* to = place(i);
    for (int64_t k = start; k < stop; k += kDeep, to += kRegister)
      _mm512_store_si512(to, effective<mode>(from + k, bits + k / 8, stop - k));
  }
  template <int32_t form>
  void dequantise_tiles(int64_t start, int64_t stop) const {
    for (int64_t tile = 0; first + tile < last; tile += kTile)
      dequantise<form>(job.tile(first + tile), start, stop, [](int64_t) {}, [&](int m, int64_t k, __m512i values) {
        const uint8_t* bits = kept(tile + m);
        _mm512_store_si512(place(tile + m) + (k - start) * kEdge, Lanes::effective<mode, 0>(values, bits + k / 8, F{}));
      });
  }
  const uint8_t* kept(int64_t i) const {
    return mode == Mode::dense ? nullptr : keep + std::min(first + i, last - 1) * job.keep_stride();
  }
  T16* place(int64_t i) const { return room + i / kEdge * apart + i % kEdge * kDeep; }
};

// Effective weights of outputs `first` to `last` as registers [register, step], turned.
template <Mode mode>
void unpack_turned(const Job<T16>& job, const uint8_t* keep, int64_t first, int64_t last, T16* room, T16* to) {
  const int64_t in = job.call.in, steps = count_steps(in);
  Ahead nothing(nullptr, 0, 1);
  for (; first < last; first += kStrip, to += 2 * steps * kRegister) {
    const Unpacked<mode> strip{job, keep, first, std::min(first + kStrip, last), room, nothing};
    for (int64_t step = 0; step < steps; step++) {
      const T16* from = strip(step);
      for (int64_t half = 0; half < 2; half++, from += strip.apart) {
        T16* at = to + (half * steps + step) * kRegister;
        turn([&](int64_t i) { return _mm512_load_si512(from + i * kDeep); },
             [&](int64_t i, __m512i pairs) { _mm512_store_si512(at + i * kDeep, pairs); });
      }
    }
  }
}

// Weights of a strip as they lie in memory, if they are what is multiplied.
inline bool is_direct(const Job<T16>& job, const Piece& piece) {
  return piece.mode == Mode::dense && job.call.form == kPlain && job.call.in % kDeep == 0;
}

// 16 rows as registers [steps], in pairs.
inline void turn_rows(const T16* rows, int64_t stride, int64_t steps, T16* to) {
  for (int64_t step = 0; step < steps; step++, rows += kDeep, to += kRegister)
    turn([&](int64_t i) { return _mm512_loadu_si512(rows + i * stride); },
         [&](int64_t i, __m512i pairs) { _mm512_store_si512(to + i * kDeep, pairs); });
}

// What has to be unpacked is unpacked once for all rows.
inline bool has_few_rows(const Job<T16>& job, const Piece& piece) {
  return piece.stop - piece.start <= (is_direct(job, piece) ? kFewRows : kStrip);
}

// Inputs of pieces with few rows as registers [rows / 16, step]. Lines beyond the last row are anything.
inline void turn_inputs(const Job<T16>& job) {
  const int64_t steps = count_steps(job.call.in);
  int64_t row = 0;
  for (const Piece& piece : job.products)
    if (has_few_rows(job, piece))
      for (row = std::max(row, piece.start / kEdge * kEdge); row < piece.stop; row += kEdge)
        turn_rows(job.inputs.x + row * job.inputs.stride, job.inputs.stride, steps,
                  job.turned + row / kEdge * steps * kRegister);
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

// A strip of weights that begins at an output, and the few rows of a piece.
template <class Weights>
void multiply_strip(const Job<T16>& job, const Weights& weights, const Piece& piece, int64_t first, const Stage& stage,
                    float* corner) {
  const int64_t steps = count_steps(job.call.in);
  for (int64_t row = piece.start, end; row < piece.stop; row = end) {
    const int64_t group = row / kEdge, beyond = (group + 1) * kEdge;
    end = std::min(piece.stop, beyond + kEdge);
    const Operand inputs{job.turned + group * steps * kRegister, kCacheLine, kRegister, steps * kRegister};
    if (end > beyond)
      multiply_registers<2, 2>(weights, inputs, steps, corner, kStrip);
    else
      multiply_registers<2, 1>(weights, inputs, steps, corner, kStrip);
    const int64_t own = std::min(end, beyond);
    turn_sums(corner + row % kEdge, row, own - row, piece.whole, first, stage);
    if (end > own) turn_sums(corner + kEdge, own, end - own, piece.whole, first, stage);
  }
}

// The same; weights come from memory, and `ahead` fetches.
inline void multiply_strip(const Job<T16>& job, const Piece& piece, int64_t first, const Stage& stage, Ahead& ahead,
                           T16* room, float* corner) {
  const int64_t in = job.call.in, last = std::min(first + kStrip, stage.last);
  const Operand direct{job.weight(first), in * static_cast<int64_t>(sizeof(T16)), kDeep, kEdge * in};
  if (piece.mode != Mode::dense)
    multiply_strip(job, Unpacked<Mode::hard>{job, piece.keep, first, last, room, ahead}, piece, first, stage, corner);
  else if (last - first < kStrip || !is_direct(job, piece))
    multiply_strip(job, Unpacked<Mode::dense>{job, nullptr, first, last, room, ahead}, piece, first, stage, corner);
  else
    multiply_strip(job, Fetching(direct, ahead), piece, first, stage, corner);
}

// A stage's outputs for the many rows of a piece. What lies beyond the last row or output is multiplied, too.
inline void multiply_turned(const Job<T16>& job, const Piece& piece, const Stage& stage, T16* room, float* corner) {
  const int64_t steps = count_steps(job.call.in), stride = job.inputs.stride, rows = piece.stop - piece.start;
  const int64_t strips = (stage.last - stage.first + kStrip - 1) / kStrip;
  T16* const turned = room + kRoom;
  const auto unpack = piece.mode == Mode::dense ? unpack_turned<Mode::dense> : unpack_turned<Mode::hard>;
  unpack(job, piece.keep, stage.first, stage.last, room, turned);
  Ahead ahead(job.memory(stage.last), kBlock / kTile * job.tile_bytes(), (rows + kStrip - 1) / kStrip * strips * steps);
  for (int64_t row = 0; row < rows; row += kStrip) {
    const int64_t count = std::min(kStrip, rows - row), line = stride * static_cast<int64_t>(sizeof(T16));
    const Fetching inputs({job.inputs.x + (piece.start + row) * stride, line, kDeep, kEdge * stride}, ahead);
    for (int64_t strip = 0; strip < strips; strip++) {
      const Operand weights{turned + 2 * strip * steps * kRegister, kCacheLine, kRegister, steps * kRegister};
      float* const sums = stage.of(piece.whole, piece.start + row, stage.first + strip * kStrip);
      if (count == kStrip) {
        multiply_registers<2, 2>(inputs, weights, steps, sums, kRow);
        continue;
      }
      multiply_registers<2, 2>(inputs, weights, steps, corner, kStrip);
      for (int64_t r = 0; r < count; r++) std::memcpy(sums + r * kRow, corner + r * kStrip, kStrip * sizeof(float));
    }
  }
}

// A stage's outputs for all pieces. `room` is for a strip's weights as they are unpacked, and for those of a block, and
// `corner` for [kStrip, kStrip] sums.
inline void multiply_matrices(const Job<T16>& job, const Stage& stage, T16* room, float* corner) {
  const Listed<T16>* const lists = job.listed.begin();
  const int64_t steps = count_steps(job.call.in), count = job.listed.size(), strips = kBlock / kStrip;
  for (int64_t strip = 0; strip < strips; strip++) {
    const int64_t first = stage.first + strip * kStrip;
    fetch_lists<false>(job, stage, lists + count * strip / strips, lists + count * (strip + 1) / strips);
    Ahead ahead(job.memory(first + kStrip), kStrip / kTile * job.tile_bytes(), steps);
    for (const Piece& piece : job.products)
      if (has_few_rows(job, piece) && first < stage.last) multiply_strip(job, piece, first, stage, ahead, room, corner);
  }
  for (const Piece& piece : job.products)
    if (!has_few_rows(job, piece)) multiply_turned(job, piece, stage, room, corner);
}

// Calls `multiply` for so many rows at a time that their inputs stay in the second cache.
template <class Multiply>
void in_bands(const Call& call, const Multiply& multiply) {
  static thread_local std::vector<Group> groups;
  const int64_t bands = (call.rows + kBandRows - 1) / kBandRows;
  const Group* const last = call.groups + call.group_count;
  if (bands == 1) return multiply(call);
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
