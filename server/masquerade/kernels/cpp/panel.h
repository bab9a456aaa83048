// Many rows of a mask: the effective weights of kPanel outputs are unpacked once, depth by depth, for all of them.
#pragma once
#include "job.h"

namespace {

constexpr int64_t kTileLanes = kTile * Lanes::width;

// Effective weights of outputs `first` to `last` and inputs `start` to `stop`, as [tile, step, part, kTile, kVector].
template <class T, Mode mode>
void unpack(const Job<T>& job, const Piece& piece, int64_t first, int64_t last, int64_t start, int64_t stop,
            T* room, Input<T>* to) {
  constexpr int step = kStep<T>;
  const F gamma = Lanes::fill(piece.gamma);
  for (int64_t tile = first; tile < last; tile += kTile) {
    const Weights<T> weights = job.weights(tile, start, std::min(stop, job.call.in), room, kApart<T>);
    for (int m = 0; m < kTile; m++) {
      const int64_t output = std::min(tile + m, last - 1);  // a tile beyond the edge computes its last output again
      const T* row = weights.at + (output - tile) * weights.apart;
      const uint8_t* keep = mode == Mode::dense ? nullptr : piece.keep + output * job.keep_stride();
      Input<T>* at = to + (tile - first) * (stop - start) + m * kVector<T>;
      for (int64_t k = start; k < stop; k += step, at += kTile * step) {
        const T* from = row + k;
        T rest[step];
        if (k + step > job.call.in) {
          std::fill(rest, rest + step, T{});
          std::memcpy(rest, from, (job.call.in - k) * sizeof(T));
          from = rest;
        }
        each_of<Lanes::parts<T>>([&](auto part) __attribute__((always_inline)) {
          Lanes::store(at + part.value * kTile * kVector<T>,
                       Lanes::effective<mode, part.value>(Lanes::read<part.value>(from), keep + k / 8, gamma));
        });
      }
    }
  }
}

// Multiplies one unpacked tile of some depth with `n` rows.
template <class T, int n>
void sweep(const Input<T>* panel, const Input<T>* x, int64_t stride, const Reach& reach) {
  const int64_t vectors = (reach.stop - reach.start) / kVector<T>;
  F total[kTile][n];
  reach.begin<n>(total);
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
  reach.end<n>(total);
}

template <class T, int n = Lanes::rows>
void sweep_rows(int64_t rows, const Input<T>* panel, const Input<T>* x, int64_t stride, const Reach& reach) {
  if constexpr (n > 1)
    if (rows < n) return sweep_rows<T, n - 1>(rows, panel, x, stride, reach);
  sweep<T, n>(panel, x, stride, reach);
}

// Outputs `first` to `last` (at most kPanel) of a piece's rows.
template <class T>
void panel_piece(const Job<T>& job, const Piece& piece, int64_t first, int64_t last, T* room, Input<T>* panel,
                 float* totals, const Stage& stage) {
  constexpr decltype(&unpack<T, Mode::dense>) kUnpack[3] = {unpack<T, Mode::dense>, unpack<T, Mode::hard>,
                                                            unpack<T, Mode::soft>};
  const int64_t tiles = (last - first + kTile - 1) / kTile, in = round_up(job.call.in, kStep<T>);
  const int64_t rows = piece.stop - piece.start, bands = (rows + kBand - 1) / kBand;
  const int64_t sweeps = rows / Lanes::rows * tiles * ((in + kDepth<T> - 1) / kDepth<T>);
  Ahead ahead(job.memory(last), kPanel / kTile * job.tile_bytes(), sweeps);
  for (int64_t band = 0; band < bands; band++) {
    const int64_t begin = piece.start + rows * band / bands, end = piece.start + rows * (band + 1) / bands;
    for (int64_t k = 0; k < in; k += kDepth<T>) {
      const int64_t depth = std::min(kDepth<T>, in - k), groups = (end - begin + Lanes::rows - 1) / Lanes::rows;
      kUnpack[static_cast<int>(piece.mode)](job, piece, first, last, k, k + depth, room, panel);
      for (int64_t group = 0; group < groups; group++) {
        const int64_t row = begin + (end - begin) * group / groups, next = begin + (end - begin) * (group + 1) / groups;
        for (int64_t tile = 0; tile < tiles; tile++) {
          float* kept = totals + ((row - begin) * tiles + tile * (next - row)) * kTileLanes;
          float* sums = stage.of(piece.whole, row, first + tile * kTile);
          const Reach reach{k, k + depth, k == 0, k + depth == in, kept, sums};
          ahead.fetch();
          sweep_rows<T>(next - row, panel + tile * kTile * depth, job.inputs.x + row * job.inputs.stride + k, job.inputs.stride, reach);
        }
      }
    }
  }
}

}  // namespace
