// Few rows of a mask: tiles of kTile outputs, multiplied straight from the weights.
#pragma once
#include "job.h"

namespace {

// Where a tile's weights and keep bits begin, and how far its outputs are apart; 0 where one output fills the tile.
template <class T>
struct Place {
  const T* weight;
  int64_t apart, keep, keep_apart;
};

// kTile outputs of `n` rows, all with one mask or `each` with its own, over some inputs.
template <class T, Mode mode, bool each, int n>
void direct(const Inputs<T>& inputs, const Pass& pass, const Place<T>& place, const Reach& reach, Ahead& ahead_) {
  constexpr int step = kStep<T>, masks = each ? n : 1;
  const int64_t in = reach.stop, stride = inputs.stride, apart = place.apart, keep_apart = place.keep_apart;
  const T* weight = place.weight;
  const Input<T>* x = inputs.x + pass.row * stride;
  Ahead ahead = ahead_;
  const uint8_t* keep[masks];
  F gamma[masks];
  for (int r = 0; r < masks; r++) {
    keep[r] = mode == Mode::dense ? nullptr : pass.keep[r] + place.keep;
    gamma[r] = Lanes::fill(pass.gamma[r]);
  }
  F total[kTile][n];
  reach.begin<n>(total);
  const auto add = [&](const T* from, int64_t from_apart, int64_t k) __attribute__((always_inline)) {
    each_of<Lanes::parts<T>>([&](auto part) __attribute__((always_inline)) {
      Vector<T> input[n];
      for (int r = 0; r < n; r++) input[r] = Lanes::load(x + r * stride + k + part.value * kVector<T>);
#pragma GCC unroll 4
      for (int m = 0; m < kTile; m++) {
        const auto raw = Lanes::read<part.value>(from + m * from_apart);
        const auto effective = [&](int r) __attribute__((always_inline)) {
          const uint8_t* bits = mode == Mode::dense ? nullptr : keep[r] + m * keep_apart + k / 8;
          return Lanes::effective<mode, part.value>(raw, bits, gamma[r]);
        };
        const Vector<T> shared = effective(0);
#pragma GCC unroll 8
        for (int r = 0; r < n; r++)
          total[m][r] = Lanes::fma(each && r ? effective(r) : shared, input[r], total[m][r]);
      }
    });
  };
  int64_t k = reach.start;
  for (; k + step <= in; k += step) {
    ahead.fetch();
    if constexpr (mode != Mode::dense)
      if (k % 128 == 0)
        for (int r = 0; r < masks; r++) __builtin_prefetch(keep[r] + kTile * keep_apart + k / 2, 0, 2);
    add(weight + k, apart, k);
  }
  if (k < in) {
    T rest[kTile][step] = {};
    for (int m = 0; m < kTile; m++) std::memcpy(rest[m], weight + m * apart + k, (in - k) * sizeof(T));
    add(rest[0], step, k);
  }
  ahead_ = ahead;
  reach.end<n>(total);
}

// The same for few rows of the base, an output after the other: processors are ahead of memory that is read in order.
// A sum waits for the one before, so of more inputs than Lanes::in_order the sums take longer than memory.
template <class T, int n>
void direct_in_order(const Inputs<T>& inputs, const Pass& pass, const Place<T>& place, const Reach& reach) {
  const Input<T>* x = inputs.x + pass.row * inputs.stride;
  F total[kTile][n];
  reach.begin<n>(total);
#pragma GCC unroll 4
  for (int m = 0; m < kTile; m++) {
    const T* weight = place.weight + m * place.apart;
    const auto add = [&](const T* from, int64_t k) __attribute__((always_inline)) {
      each_of<Lanes::parts<T>>([&](auto part) __attribute__((always_inline)) {
        const Vector<T> values = Lanes::effective<Mode::dense, part.value>(Lanes::read<part.value>(from), nullptr, F{});
#pragma GCC unroll 4
        for (int r = 0; r < n; r++)
          total[m][r] = Lanes::fma(values, Lanes::load(x + r * inputs.stride + k + part.value * kVector<T>), total[m][r]);
      });
    };
    int64_t k = reach.start;
    for (; k + kStep<T> <= reach.stop; k += kStep<T>) add(weight + k, k);
    if (k < reach.stop) {
      T rest[kStep<T>] = {};
      std::memcpy(rest, weight + k, (reach.stop - k) * sizeof(T));
      add(rest, k);
    }
  }
  reach.end<n>(total);
}

template <class T, int n = kInOrder>
void direct_rows_in_order(const Inputs<T>& inputs, const Pass& pass, const Place<T>& place, const Reach& reach) {
  if constexpr (n > 1)
    if (pass.rows < n) return direct_rows_in_order<T, n - 1>(inputs, pass, place, reach);
  direct_in_order<T, n>(inputs, pass, place, reach);
}

template <class T, Mode mode, bool each, int n = Lanes::rows>
void direct_rows(const Inputs<T>& inputs, const Pass& pass, const Place<T>& place, const Reach& reach, Ahead& ahead) {
  if constexpr (n > 1)
    if (pass.rows < n) return direct_rows<T, mode, each, n - 1>(inputs, pass, place, reach, ahead);
  direct<T, mode, each, n>(inputs, pass, place, reach, ahead);
}

// The same for the products of a single pass without masks and quantised weights: they never leave the registers.
template <class T, int32_t form, int n>
void direct_quantised(const Inputs<T>& inputs, const Pass& pass, const QuantisedTile& tile, const Reach& reach,
                      Ahead& ahead_) {
  const Input<T>* x = inputs.x + pass.row * inputs.stride;
  Ahead ahead = ahead_;
  F total[kTile][n];
  reach.begin<n>(total);
  const auto fetch = [&](int64_t) __attribute__((always_inline)) { ahead.fetch(); };
  dequantise<form>(tile, reach.start, reach.stop, fetch, [&](int m, int64_t k, auto values) __attribute__((always_inline)) {
    each_of<Lanes::parts<T>>([&](auto part) __attribute__((always_inline)) {
      const Vector<T> weights = Lanes::effective<Mode::dense, part.value>(values, nullptr, F{});
#pragma GCC unroll 8
      for (int r = 0; r < n; r++) {
        const Vector<T> input = Lanes::load(x + r * inputs.stride + k + part.value * kVector<T>);
        total[m][r] = Lanes::fma(weights, input, total[m][r]);
      }
    });
  });
  ahead_ = ahead;
  reach.end<n>(total);
}

template <class T, int32_t form, int n = Lanes::rows>
void direct_quantised_rows(const Inputs<T>& inputs, const Pass& pass, const QuantisedTile& tile, const Reach& reach,
                           Ahead& ahead) {
  if constexpr (n > 1)
    if (pass.rows < n) return direct_quantised_rows<T, form, n - 1>(inputs, pass, tile, reach, ahead);
  direct_quantised<T, form, n>(inputs, pass, tile, reach, ahead);
}

// Whether that is done.
template <class T>
constexpr bool kFuses = Lanes::fuses && std::is_same_v<T, T16>;

// The tile that begins at an output, for all passes.
template <class T>
void direct_tile(const Job<T>& job, int64_t output, T* room, float* totals, const Stage& stage) {
  constexpr decltype(&direct_rows<T, Mode::dense, false>) kDirect[3][2] = {
      {direct_rows<T, Mode::dense, false>, nullptr},
      {direct_rows<T, Mode::hard, false>, direct_rows<T, Mode::hard, true, Lanes::each>},
      {direct_rows<T, Mode::soft, false>, direct_rows<T, Mode::soft, true, Lanes::each>}};
  const int64_t in = job.call.in, steps = job.passes.size() * (in / kStep<T> + 1);
  // A single pass over long rows of plain weights takes memory as fast as it comes, in pairs of lines: to ask for each
  // line would be in its way.
  const bool single = job.passes.size() == 1 && job.passes.begin()->mode == Mode::dense;
  const bool fused = kFuses<T> && single && job.call.form != kPlain;
  const bool plain = single && job.call.form == kPlain;
  const int64_t rows = job.passes.begin()->rows;
  const bool in_order = plain && rows <= kInOrder && in <= kChunk && rows * in <= Lanes::in_order<T>;
  const bool pairs = plain && job.tile_bytes() >= kTile * kLong;
  Ahead ahead(job.memory(output + kTile), job.tile_bytes(), steps, pairs ? 2 * kCacheLine : kCacheLine);
  const auto compute = [&](int64_t at, int64_t apart) {
    for (int64_t k = 0; k < in; k += kChunk) {
      const int64_t stop = std::min(k + kChunk, in);
      const Weights<T> weights = fused && apart ? Weights<T>{} : job.weights(at, k, stop, room, kApart<T>);
      const Place<T> place{weights.at, apart * weights.apart, at * job.keep_stride(), apart * job.keep_stride()};
      float* kept = totals;
      for (const Pass& pass : job.passes) {
        const Reach reach{k, stop, k == 0, stop == in, kept, stage.of(pass.whole, pass.row, at)};
        if (in_order && apart)
          direct_rows_in_order(job.inputs, pass, place, reach);
        else if (!fused || !apart)
          kDirect[static_cast<int>(pass.mode)][pass.each](job.inputs, pass, place, reach, ahead);
        else if constexpr (kFuses<T>)
          with_form(job.call.form, [&](auto form) {
            direct_quantised_rows<T, form.value>(job.inputs, pass, job.tile(at), reach, ahead);
          });
        kept += pass.rows * kTile * Lanes::width;
      }
    }
  };
  if (output + kTile <= stage.last) return compute(output, 1);
  for (; output < stage.last; output++) compute(output, 0);
}

}  // namespace
