// The masked product in terms of `Lanes`, which the including unit has defined. Everything is in an anonymous namespace,
// so that no function built for one instruction set is ever linked into another.
//
// Why a row's result never depends on its neighbours or on the number of threads: each (row, output) has one vector
// accumulator, which takes the products of k = 0, 1, ... in this order whichever tile computes it, and is summed over its
// lanes in one fixed tree. Threads split the outputs. `-ffp-contract=off`: only the FMAs written here are fused.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "call.h"

namespace {

constexpr int kTile = 4;          // outputs of a tile
constexpr int kPanel = 16;        // outputs of a panel: what is unpacked and used for many rows
constexpr int64_t kDepth = 1024;  // inputs of a panel
constexpr int64_t kBand = 240;    // rows whose accumulators are kept from one depth to the next
constexpr int64_t kMany = 8;        // from so many rows of a mask on, its weights are unpacked into panels
constexpr int64_t kManyDense = 24;  // the same for weights as they are
constexpr int64_t kFew = 4;         // from so many rows of a sparse mask on, their inputs are transposed
constexpr int64_t kWorthAThread = 1 << 15;  // weights
constexpr int64_t kLine = 16;     // rows that share a mask's list of pruned weights: a cache line of inputs
constexpr int kOctet = 8;          // pruned weights of a list that are gathered together
constexpr int64_t kAhead = 512;    // bytes of a row by which weights are fetched before they are used
constexpr int64_t kSoon = 16;      // listed weights by which their inputs are
constexpr int64_t kAlign = 16;    // floats in a cache line

using F = Lanes::F;
using Octet = Lanes::Octet;
using T32 = float;
using T16 = uint16_t;  // the bits of a bf16

inline float widen(T32 value) { return value; }
inline float widen(T16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline void narrow(float value, T32* to) { *to = value; }
inline void narrow(float value, T16* to) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  *to = static_cast<T16>(nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// A step is what one load of keep bits covers, a few vectors: of fp32 weights in their order, or the even and the odd ones
// of a vector of bf16. Inputs are laid out alike.
template <class T>
constexpr int kStep = Lanes::step<T>;
template <class T>
using Input = Lanes::Input<T>;  // what inputs and unpacked weights are kept as
template <class T>
constexpr int kVector = kStep<T> / Lanes::parts<T>;  // of them in a vector
template <class T>
constexpr int64_t kPad = 64 / sizeof(Input<T>);  // of them in a cache line

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Memory that a thread keeps from call to call.
class Scratch {
 public:
  void* reserve(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, round_up(bytes, 64));
      if (!data_) std::abort();
      size_ = bytes;
    }
    return data_;
  }
  ~Scratch() { std::free(data_); }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// Rows (in sorted order) that are multiplied with the same effective weights.
struct Piece {
  Mode mode;
  float gamma;
  const uint8_t* keep;
  int64_t start, stop;
};

// Rows of one sparse mask, whose pruned weights are taken from the dense product.
struct Listed {
  const Group* group;
  int64_t start, stop;
  const float* lines;  // inputs as [in, kLine], zero-padded, where several rows share the list; else null
};

template <class T>
struct Job {
  const Call& call;
  const Input<T>* x;  // [rows, stride], in steps
  int64_t stride;
  const Piece *pieces, *pieces_end;
  const Listed *listed, *listed_end;
  bool panels;  // whether any piece is unpacked

  const T* weight(int64_t output) const { return static_cast<const T*>(call.weight) + output * call.in; }
  const T* input(int64_t row) const { return static_cast<const T*>(call.x) + place(row) * call.in; }
  T* result(int64_t row) const { return static_cast<T*>(call.y) + place(row) * call.out; }
  int64_t place(int64_t row) const { return call.order ? call.order[row] : row; }
  int64_t keep_stride() const { return round_up(call.in, 64) / 8; }
};

// ---- inputs

template <class T>
void lay_out(const T* from, int64_t in, int64_t stride, Input<T>* to) {
  if constexpr (std::is_same_v<T, Input<T>>) {
    std::memcpy(to, from, in * sizeof(T));
    std::fill(to + in, to + stride, T{});
    return;
  }
  constexpr int step = kStep<T>, width = Lanes::width;
  for (int64_t k = 0; k < stride; k += step)
    for (int i = 0; i < step; i++) {
      const int at = i % 2 * width + i / 2;
      to[k + at] = k + i < in ? widen(from[k + i]) : 0.0f;
    }
}

template <class T>
void lay_out_lines(const Job<T>& job, const Listed& listed, float* to) {
  std::memset(to, 0, job.call.in * kLine * sizeof(float));
  for (int64_t row = listed.start; row < listed.stop; row++) {
    const T* from = job.input(row);
    for (int64_t k = 0; k < job.call.in; k++) to[k * kLine + row - listed.start] = widen(from[k]);
  }
}

// ---- tiles straight from the weights: few rows

template <class T, class Add>
inline __attribute__((always_inline)) void each_part(const Add& add) {
  add(std::integral_constant<int, 0>{});
  if constexpr (Lanes::parts<T> > 1) add(std::integral_constant<int, 1>{});
  if constexpr (Lanes::parts<T> > 2) add(std::integral_constant<int, 2>{}), add(std::integral_constant<int, 3>{});
}

// kTile outputs of `n` rows. Only the first piece of a tile fetches its weights; everybody fetches the next tile's bits.
template <class T>
using Vector = decltype(Lanes::load(std::declval<const Input<T>*>()));

template <class T, Mode mode, int n, bool fetch>
void direct(const T* const (&weight)[kTile], const uint8_t* const (&keep)[kTile], int64_t in, const Input<T>* x,
            int64_t stride, float gamma_, const uint8_t* keep_ahead, float* sums) {
  constexpr int step = kStep<T>;
  const F gamma = Lanes::fill(gamma_);
  F total[kTile][n];
  for (int m = 0; m < kTile; m++)
    for (int r = 0; r < n; r++) total[m][r] = Lanes::fill(0.0f);
  const auto add = [&](const T* const* from, const uint8_t* const* bits, int64_t w_at, int64_t k)
                       __attribute__((always_inline)) {
    const auto add_part = [&](auto part) __attribute__((always_inline)) {
      Vector<T> input[n];
      for (int r = 0; r < n; r++) input[r] = Lanes::load(x + r * stride + k + part.value * kVector<T>);
#pragma GCC unroll 4
      for (int m = 0; m < kTile; m++) {
        const auto w = Lanes::weight<mode, part.value>(from[m] + w_at,
                                                       mode == Mode::dense ? nullptr : bits[m] + w_at / 8, gamma);
#pragma GCC unroll 8
        for (int r = 0; r < n; r++) total[m][r] = Lanes::fma(w, input[r], total[m][r]);
      }
    };
    each_part<T>(add_part);
  };
  int64_t k = 0;
  for (; k + step <= in; k += step) {
    if constexpr (fetch) {
      const int64_t bytes = in * sizeof(T), at = k * sizeof(T) + kAhead;  // beyond a row's end, the next tile's begins
      if (at % 64 == 0)
        for (int m = 0; m < kTile; m++)
          for (unsigned line = 0; line < step * sizeof(T); line += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(weight[m]) + at + line + (at < bytes ? 0 : 3 * bytes));
    }
    if constexpr (mode != Mode::dense)
      if (k % 128 == 0) __builtin_prefetch(keep_ahead + k / 2, 0, 2);
    add(weight, keep, k, k);
  }
  if (k < in) {
    T rest[kTile][step] = {};
    const T* from[kTile];
    const uint8_t* bits[kTile];
    for (int m = 0; m < kTile; m++) {
      std::memcpy(rest[m], weight[m] + k, (in - k) * sizeof(T));
      from[m] = rest[m];
      bits[m] = mode == Mode::dense ? nullptr : keep[m] + k / 8;
    }
    add(from, bits, 0, k);
  }
  for (int r = 0; r < n; r++) Lanes::reduce(total[0][r], total[1][r], total[2][r], total[3][r], sums + r * kTile);
}

template <class T, Mode mode, bool fetch, int n = Lanes::rows>
void direct_rows(int64_t rows, const T* const (&weight)[kTile], const uint8_t* const (&keep)[kTile], int64_t in,
                 const Input<T>* x, int64_t stride, float gamma, const uint8_t* keep_ahead, float* sums) {
  if constexpr (n > 1)
    if (rows < n) return direct_rows<T, mode, fetch, n - 1>(rows, weight, keep, in, x, stride, gamma, keep_ahead, sums);
  direct<T, mode, n, fetch>(weight, keep, in, x, stride, gamma, keep_ahead, sums);
}

// Outputs `first` to `last` (at most kTile) of a piece's rows, into stage[row][output - base].
template <class T, Mode mode, bool fetch>
void direct_piece(const Job<T>& job, const Piece& piece, int64_t first, int64_t last, float* stage, int64_t width) {
  const T* weight[kTile];
  const uint8_t* keep[kTile];
  for (int m = 0; m < kTile; m++) {
    const int64_t output = std::min(first + m, last - 1);  // a tile beyond the edge computes its last output again
    weight[m] = job.weight(output);
    keep[m] = mode == Mode::dense ? nullptr : piece.keep + output * job.keep_stride();
  }
  const int64_t next = std::min(first + kTile, job.call.out - 1);
  const uint8_t* keep_ahead = mode == Mode::dense ? nullptr : piece.keep + next * job.keep_stride();
  for (int64_t row = piece.start; row < piece.stop;) {
    const int64_t pieces = (piece.stop - row + Lanes::rows - 1) / Lanes::rows;
    const int64_t n = (piece.stop - row + pieces - 1) / pieces;
    float sums[Lanes::rows * kTile];
    const Input<T>* x = job.x + row * job.stride;
    if (fetch && row == piece.start)
      direct_rows<T, mode, fetch>(n, weight, keep, job.call.in, x, job.stride, piece.gamma, keep_ahead, sums);
    else
      direct_rows<T, mode, false>(n, weight, keep, job.call.in, x, job.stride, piece.gamma, keep_ahead, sums);
    for (int64_t r = 0; r < n; r++)
      std::memcpy(stage + (row + r) * width, sums + r * kTile, (last - first) * sizeof(float));
    row += n;
  }
}

// ---- panels: the effective weights of kPanel outputs, unpacked once for many rows

template <class T, Mode mode>
void unpack(const Job<T>& job, const Piece& piece, int64_t first, int64_t last, int64_t start, int64_t stop,
            Input<T>* to) {
  constexpr int step = kStep<T>;
  const F gamma = Lanes::fill(piece.gamma);
  for (int64_t tile = first; tile < last; tile += kTile)
    for (int64_t k = start; k < stop; k += step)
      for (int m = 0; m < kTile; m++) {
        const int64_t output = std::min(tile + m, last - 1);
        const T* from = job.weight(output) + k;
        const uint8_t* keep = mode == Mode::dense ? nullptr : piece.keep + output * job.keep_stride() + k / 8;
        T rest[step] = {};
        if (k + step > job.call.in) {
          std::memcpy(rest, from, (job.call.in - k) * sizeof(T));
          from = rest;
        }
        Input<T>* at = to + ((tile - first) * round_up(stop - start, step)) + (k - start) * kTile + m * kVector<T>;
        each_part<T>([&](auto part) __attribute__((always_inline)) {
          Lanes::store(at + part.value * kTile * kVector<T>, Lanes::weight<mode, part.value>(from, keep, gamma));
        });
      }
}

// Adds one panel tile [vectors, kTile, kVector] to the accumulators of `n` rows, [n, kTile, width].
template <class T, int n>
void sweep(const Input<T>* panel, int64_t vectors, const Input<T>* x, int64_t stride, float* totals) {
  F total[kTile][n];
  for (int r = 0; r < n; r++)
    for (int m = 0; m < kTile; m++) total[m][r] = Lanes::load(totals + (r * kTile + m) * Lanes::width);
  for (int64_t vector = 0; vector < vectors; vector++) {
    Vector<T> input[n];
    for (int r = 0; r < n; r++) input[r] = Lanes::load(x + r * stride + vector * kVector<T>);
#pragma GCC unroll 4
    for (int m = 0; m < kTile; m++) {
      const Vector<T> w = Lanes::load(panel + (vector * kTile + m) * kVector<T>);
#pragma GCC unroll 8
      for (int r = 0; r < n; r++) total[m][r] = Lanes::fma(w, input[r], total[m][r]);
    }
  }
  for (int r = 0; r < n; r++)
    for (int m = 0; m < kTile; m++) Lanes::store(totals + (r * kTile + m) * Lanes::width, total[m][r]);
}

template <class T, int n = Lanes::rows>
void sweep_rows(int64_t rows, const Input<T>* panel, int64_t vectors, const Input<T>* x, int64_t stride, float* totals) {
  if constexpr (n > 1)
    if (rows < n) return sweep_rows<T, n - 1>(rows, panel, vectors, x, stride, totals);
  sweep<T, n>(panel, vectors, x, stride, totals);
}

// Outputs `first` to `last` (at most kPanel) of a piece's rows, into stage[row][output - first].
template <class T, Mode mode>
void panel_piece(const Job<T>& job, const Piece& piece, int64_t first, int64_t last, float* scratch, float* stage,
                 int64_t width) {
  constexpr int64_t vector = kTile * Lanes::width;
  auto* panel = reinterpret_cast<Input<T>*>(scratch);
  float* totals = scratch + kPanel * kDepth;  // [row, tile, kTile, lanes]
  const int64_t tiles = (last - first + kTile - 1) / kTile, in = round_up(job.call.in, kStep<T>);
  for (int64_t begin = piece.start; begin < piece.stop; begin += kBand) {
    const int64_t end = std::min(begin + kBand, piece.stop);
    std::memset(totals, 0, (end - begin) * tiles * vector * sizeof(float));
    for (int64_t k = 0; k < in; k += kDepth) {
      const int64_t depth = std::min(kDepth, in - k);
      unpack<T, mode>(job, piece, first, last, k, k + depth, panel);
      for (int64_t row = begin; row < end;) {
        const int64_t pieces = (end - row + Lanes::rows - 1) / Lanes::rows, n = (end - row + pieces - 1) / pieces;
        const Input<T>* x = job.x + row * job.stride + k;
        for (int64_t tile = 0; tile < tiles; tile++)
          sweep_rows<T>(n, panel + tile * kTile * depth, depth / kVector<T>, x, job.stride,
                        totals + ((row - begin) * tiles + tile * n) * vector);
        row += n;
      }
    }
    for (int64_t row = begin; row < end;) {
      const int64_t pieces = (end - row + Lanes::rows - 1) / Lanes::rows, n = (end - row + pieces - 1) / pieces;
      for (int64_t tile = 0; tile < tiles; tile++)
        for (int64_t r = 0; r < n; r++) {
          const float* total = totals + ((row - begin) * tiles + tile * n + r) * vector;
          float sums[kTile];
          Lanes::reduce(Lanes::load(total), Lanes::load(total + Lanes::width), Lanes::load(total + 2 * Lanes::width),
                        Lanes::load(total + 3 * Lanes::width), sums);
          const int64_t outputs = std::min<int64_t>(kTile, last - first - tile * kTile);
          std::memcpy(stage + (row + r) * width + tile * kTile, sums, outputs * sizeof(float));
        }
      row += n;
    }
  }
}

// ---- sparse masks: what the dense product has too much

// The product without the pruned weights, one by one: where one of them is not finite, it cannot be subtracted.
template <class T, class C>
float without(const Job<T>& job, const int32_t* offsets, const C* columns, int64_t output, int64_t row) {
  const T *w = job.weight(output), *x = job.input(row);
  float sum = 0.0f;
  int32_t next = offsets[output];
  for (int64_t k = 0; k < job.call.in; k++) {
    if (next < offsets[output + 1] && columns[next] == k)
      next++;
    else
      sum = Lanes::fma(widen(w[k]), widen(x[k]), sum);
  }
  return sum;
}

// Lane i of a sum takes the pruned weights i, i + 8, ... of a list, in this order, wherever it is summed.
template <class T, class C>
Octet sum_list(const T* w, const T* x, const C* columns, int64_t begin, int64_t end, int64_t total) {
  const Octet none = {};
  const Lanes::Octet32 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  Octet sum = none;
  for (int64_t j = begin; j < end; j += kOctet) {
    const C* at = columns + j;
    C rest[kOctet] = {};
    if (j + kOctet > total) {
      std::memcpy(rest, at, (total - j) * sizeof(C));
      at = rest;
    }
    const Octet value = Lanes::gather(w, at);
    sum = Lanes::fma(lane < static_cast<int32_t>(end - j) ? value : none, Lanes::gather(x, at), sum);
  }
  return sum;
}

// The same for all rows of `lines` at once: the lanes' sums are side by side, [kOctet, kLine].
template <class T, class C>
void sum_lines(const T* w, const float* lines, const C* columns, int64_t begin, int64_t end, int64_t total,
               float* pruned) {
  constexpr int parts = kLine / Lanes::width;
  F sums[kOctet][parts];
  for (auto& sum : sums)
    for (auto& part : sum) part = Lanes::fill(0.0f);
  for (int64_t j = begin; j < end; j++) {
    const F value = Lanes::fill(widen(w[columns[j]]));
    const float* line = lines + columns[j] * kLine;
    __builtin_prefetch(lines + columns[std::min(j + kSoon, total - 1)] * kLine);
    F* sum = sums[(j - begin) % kOctet];
    for (int part = 0; part < parts; part++)
      sum[part] = Lanes::fma(value, Lanes::load(line + part * Lanes::width), sum[part]);
  }
  for (int part = 0; part < parts; part++) {
    F fold[4];
    for (int lane = 0; lane < 4; lane++) fold[lane] = sums[lane][part] + sums[lane + 4][part];
    Lanes::store(pruned + part * Lanes::width, (fold[0] + fold[1]) + (fold[2] + fold[3]));
  }
}

template <class T, class C>
void subtract(const Job<T>& job, const Listed& listed, int64_t first, int64_t last, float* stage, int64_t width) {
  const auto* offsets = static_cast<const int32_t*>(listed.group->part.first);
  const auto* columns = static_cast<const C*>(listed.group->part.second);
  const float strength = listed.group->strength;
  const int64_t total = offsets[job.call.out];
  const auto take = [&](int64_t output, int64_t row, float pruned) {
    float& y = stage[row * width + output - first];
    y = Lanes::fma(-strength, pruned, y);
    if (__builtin_expect(!__builtin_isfinite(y), 0) && strength == 1.0f)
      y = without(job, offsets, columns, output, row);
  };
  if (listed.lines) {
    for (int64_t output = first; output < last; output++) {
      float pruned[kLine];
      sum_lines(job.weight(output), listed.lines, columns, offsets[output], offsets[output + 1], total, pruned);
      for (int64_t row = listed.start; row < listed.stop; row++) take(output, row, pruned[row - listed.start]);
    }
    return;
  }
  for (int64_t tile = first; tile < last; tile += kTile)
    for (int64_t row = listed.start; row < listed.stop; row++) {
      Octet sums[kTile] = {};
      const int64_t outputs = std::min<int64_t>(kTile, last - tile);
      for (int64_t m = 0; m < outputs; m++)
        sums[m] = sum_list(job.weight(tile + m), job.input(row), columns, offsets[tile + m], offsets[tile + m + 1], total);
      float pruned[kTile];
      Lanes::reduce(sums[0], sums[1], sums[2], sums[3], pruned);
      for (int64_t m = 0; m < outputs; m++) take(tile + m, row, pruned[m]);
    }
  if (last < job.call.out) {
    __builtin_prefetch(columns + offsets[last]);
    __builtin_prefetch(columns + offsets[last] + 64 / sizeof(C));
    __builtin_prefetch(offsets + last + 2 * kAlign);
  }
}

// ---- the whole

template <class T>
void finish(const Job<T>& job, int64_t first, int64_t last, const float* stage, int64_t width) {
  const T* bias = static_cast<const T*>(job.call.bias);
  for (int64_t row = 0; row < job.call.rows; row++) {
    T* y = job.result(row);
    for (int64_t output = first; output < last; output++) {
      const float value = stage[row * width + output - first];
      narrow(bias ? value + widen(bias[output]) : value, y + output);
    }
  }
}

// Whether a piece's weights are worth unpacking.
inline bool is_many(const Piece& piece) {
  return piece.stop - piece.start >= (piece.mode == Mode::dense ? kManyDense : kMany);
}

// Outputs `start` to `stop` of all rows; one thread's share.
template <class T>
void run(const Job<T>& job, int64_t start, int64_t stop) {
  constexpr bool scales = std::is_same_v<Input<T>, float>;  // weights, in registers; else two products are blended
  constexpr decltype(&direct_piece<T, Mode::dense, true>) kDirect[3][2] = {
      {direct_piece<T, Mode::dense, false>, direct_piece<T, Mode::dense, true>},
      {direct_piece<T, Mode::hard, false>, direct_piece<T, Mode::hard, true>},
      {direct_piece<T, Mode::soft, false>, direct_piece<T, Mode::soft, true>}};
  constexpr decltype(&panel_piece<T, Mode::dense>) kUnpacked[3] = {
      panel_piece<T, Mode::dense>, panel_piece<T, Mode::hard>, panel_piece<T, Mode::soft>};
  static thread_local Scratch scratch;
  const int64_t width = job.panels ? kPanel : kTile, room = job.panels ? kPanel * (kDepth + kBand * Lanes::width) : 0;
  const int64_t staged = job.call.rows * width;
  float* panel = static_cast<float*>(scratch.reserve((room + 2 * staged) * sizeof(float)));
  float *stage = panel + room, *whole = stage + staged;  // fp32 outputs, [rows, width], and dense ones to blend in
  for (int64_t first = start; first < stop; first += width) {
    const int64_t last = std::min(first + width, stop);
    const auto compute = [&](const Piece* piece, Mode mode, float* to) {
      const auto as = static_cast<int>(mode);
      if (is_many(*piece)) return kUnpacked[as](job, *piece, first, last, panel, to, width);
      const bool fetch = !job.panels && piece == job.pieces;
      for (int64_t tile = first; tile < last; tile += kTile)
        kDirect[as][fetch](job, *piece, tile, std::min<int64_t>(tile + kTile, last), to + tile - first, width);
    };
    for (const Piece* piece = job.pieces; piece < job.pieces_end; piece++) {
      if (scales || piece->mode != Mode::soft) {
        compute(piece, piece->mode, stage);
        continue;
      }
      compute(piece, Mode::hard, stage);
      compute(piece, Mode::dense, whole);
      for (int64_t row = piece->start; row < piece->stop; row++)
        for (int64_t at = row * width; at < row * width + last - first; at++)
          stage[at] = Lanes::fma(piece->gamma, whole[at], (1.0f - piece->gamma) * stage[at]);
    }
    for (const Listed* listed = job.listed; listed < job.listed_end; listed++) {
      if (listed->group->part.kind == kSparse16)
        subtract<T, uint16_t>(job, *listed, first, last, stage, width);
      else
        subtract<T, uint32_t>(job, *listed, first, last, stage, width);
    }
    finish(job, first, last, stage, width);
  }
}

template <class T>
void multiply_as(const Call& call) {
  static thread_local Scratch scratch;
  // A cache line more than a multiple of the step, lest all rows fall on the same lines of the first cache.
  Job<T> job{call, nullptr, round_up(call.in, kStep<T>) + kPad<T>, nullptr, nullptr, nullptr, nullptr, false};

  int64_t listed_count = 0, line_count = 0, row = call.rows;
  for (const Group* group = call.groups; group < call.groups + call.group_count; group++) {
    row -= group->rows;
    if (group->part.kind == kBitmap) continue;
    listed_count += (group->rows + kLine - 1) / kLine;
    line_count += (group->rows + kLine - kFew) / kLine;
  }
  const int64_t x_count = round_up(call.rows * job.stride, kPad<T>), line_floats = call.in * kLine;
  auto* x = static_cast<Input<T>*>(
      scratch.reserve(x_count * sizeof(Input<T>) + line_count * line_floats * sizeof(float) +
                      (call.group_count + 1) * sizeof(Piece) + listed_count * sizeof(Listed)));
  auto* lines = reinterpret_cast<float*>(x + x_count);
  Piece* piece = reinterpret_cast<Piece*>(lines + line_count * line_floats);
  Listed* listed = reinterpret_cast<Listed*>(piece + call.group_count + 1);

  job.x = x, job.pieces = piece, job.listed = listed;
  for (int64_t r = 0; r < call.rows; r++) lay_out(job.input(r), call.in, job.stride, x + r * job.stride);
  *piece = {Mode::dense, 1.0f, nullptr, 0, row};  // the rows of the base, and those of sparse masks
  for (const Group* group = call.groups; group < call.groups + call.group_count; row += group->rows, group++) {
    if (group->part.kind == kBitmap) {
      if (piece->stop > piece->start) piece++;
      const Mode mode = group->strength == 1.0f ? Mode::hard : Mode::soft;
      *piece = {mode, 1.0f - group->strength, static_cast<const uint8_t*>(group->part.first), row, row + group->rows};
      continue;
    }
    piece->stop += group->rows;
    for (int64_t start = row; start < row + group->rows; start += kLine, listed++) {
      const int64_t stop = std::min(start + kLine, row + group->rows);
      *listed = {group, start, stop, nullptr};
      if (stop - start < kFew) continue;
      lay_out_lines(job, *listed, lines);
      listed->lines = lines;
      lines += line_floats;
    }
  }
  job.pieces_end = piece + 1, job.listed_end = listed;
  for (const Piece* one = job.pieces; one < job.pieces_end; one++) job.panels |= is_many(*one);

  const int64_t width = job.panels ? kPanel : kTile, blocks = (call.out + width - 1) / width;
  const int64_t shares = std::min<int64_t>(call.threads, std::max<int64_t>(1, call.out * call.in / kWorthAThread));
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(shares)) if (shares > 1)
  for (int64_t share = 0; share < shares; share++)
    run(job, blocks * share / shares * width, std::min(blocks * (share + 1) / shares * width, call.out));
}

[[maybe_unused]] void multiply(const Call& call) {
  if (call.dtype == kFloat32)
    multiply_as<T32>(call);
  else
    multiply_as<T16>(call);
}

}  // namespace
