// The masked product in terms of `Lanes`, which the including unit has defined. Everything is in an anonymous
// namespace, so that no function built for one instruction set is ever linked into another.
//
// Why a row's result never depends on its neighbours or on the number of threads: each (row, output) has one vector
// accumulator, which takes the products of k = 0, 1, ... in this order whichever tile computes it, and is summed over
// its lanes in one fixed tree. What a list prunes has an order of its own (lists.h). Threads split the outputs.
// `-ffp-contract=off`: only the FMAs written here are fused.
#pragma once
#if defined(__AMX_BF16__)
#include "amx.h"
#endif
#include "direct.h"
#include "lists.h"
#include "panel.h"
#include "rounded.h"

namespace {

template <class T>
void finish(const Job<T>& job, const Stage& stage) {
  const T* bias = static_cast<const T*>(job.call.bias);
  const int64_t outputs = stage.last - stage.first;
  for (int64_t row = 0; row < job.call.rows; row++) {
    float* sums = stage.of(false, row, stage.first);
    T* y = job.result(row) + stage.first;
    if (bias)
      for (int64_t i = 0; i < outputs; i++) sums[i] += widen(bias[stage.first + i]);
    for (int64_t i = 0; i < outputs; i++) narrow(sums[i], y + i);
  }
}

// What a thread works with: a block on its way, a tile that is dequantised, accumulators between two reaches, unpacked
// weights, sums of lists; effective weights of matrix registers, and sums on their way.
template <class T>
struct Bench {
  Stage stage;
  T* room;
  float* totals;
  Input<T>* panel;
  float* lists;
  T* matrices;
  float* corner;
  Lanes::Registers registers;

  Bench(Scratch& scratch, const Job<T>& job, int64_t start) {
    const int64_t rows = job.call.rows, staged = rows * kRow, blended = job.blends.size() ? staged : 0;
    const int64_t panels = job.panels.size() ? kPanel : 0, summed = job.listed.size() ? kLine<T> * kBlock : 0;
    const int64_t kept = std::max(panels * kBand, 2 * rows * kTile) * Lanes::width;
    const int64_t floats = staged + blended + kept + summed;
    const int64_t dequantised = job.call.form == kPlain ? 0 : kTile * kApart<T>;
    const int64_t unpacked = job.products.size() ? kBlock * (round_up(job.call.in, kStep<T>) + 8 * kStep<T>) : 0;
    const int64_t sums = unpacked ? 4 * Lanes::matrix * Lanes::matrix : 0;
    scratch.reserve((floats + sums) * sizeof(float) + panels * kDepth<T> * sizeof(Input<T>) +
                        (dequantised + unpacked) * sizeof(T), 8);
    stage = {scratch.take<float>(staged), scratch.take<float>(blended), start, start};
    totals = scratch.take<float>(kept);
    panel = scratch.take<Input<T>>(panels * kDepth<T>);
    lists = scratch.take<float>(summed);
    room = scratch.take<T>(dequantised);
    matrices = scratch.take<T>(unpacked);
    corner = scratch.take<float>(sums);
  }
};

// Outputs `start` to `stop` of all rows; one thread's share, whole blocks.
template <class T>
void run(const Job<T>& job, const Rounded& rounded, int64_t start, int64_t stop) {
  static thread_local Scratch scratch;
  Bench<T> bench(scratch, job, start);
  Stage& stage = bench.stage;
  for (; stage.first < stop; stage.first = stage.last) {
    stage.last = std::min(stage.first + kBlock, stop);
    if (job.passes.size() || rounded.rows)
      for (int64_t output = stage.first; output < stage.last; output += kTile) {
        const int64_t lists = job.listed.size(), tile = (output - stage.first) / kTile, tiles = kBlock / kTile;
        const Listed<T>* first = job.listed.begin();
        fetch_lists<false>(job, stage, first + lists * tile / tiles, first + lists * (tile + 1) / tiles);
        if (job.passes.size()) direct_tile(job, output, bench.room, bench.totals, stage);
        if constexpr (Lanes::rounds)
          if (rounded.rows) rounded_tile<Lanes>(job, rounded, output, stage.of(false, 0, output));
      }
    if constexpr (kMatrices<T>) multiply_matrices(job, stage, bench.matrices, bench.corner);
    for (const Piece& piece : job.panels)
      for (int64_t first = stage.first; first < stage.last; first += kPanel)
        panel_piece(job, piece, first, std::min(first + kPanel, stage.last), bench.room, bench.panel, bench.totals,
                    stage);
    for (const Piece& piece : job.blends)
      for (int64_t at = piece.start * kRow; at < piece.stop * kRow; at++)
        stage.sums[at] = Lanes::fma(piece.gamma, stage.whole[at], (1.0f - piece.gamma) * stage.sums[at]);
    with_lists(job.listed.begin(), job.listed.end(), [&](const Listed<T>& listed, auto column) {
      fetch_lists<true>(job, stage, &listed + 1, &listed + 2);
      subtract<T, decltype(column)>(job, listed, stage, bench.lists);
    });
    finish(job, stage);
  }
}

// Rows of a piece become passes, of a mask with one row together with others like it.
inline void pass_over(const Piece& piece, Many<Pass>& passes) {
  const int64_t rows = piece.stop - piece.start, parts = (rows + Lanes::rows - 1) / Lanes::rows;
  if (rows == 1 && piece.mode != Mode::dense && passes.size()) {
    Pass& last = passes.end_[-1];
    const bool joins = last.mode == piece.mode && last.whole == piece.whole && (last.each || last.rows == 1);
    if (joins && last.rows < Lanes::each && last.row + last.rows == piece.start) {
      last.each = true;
      last.gamma[last.rows] = piece.gamma;
      last.keep[last.rows++] = piece.keep;
      return;
    }
  }
  for (int64_t part = 0; part < parts; part++) {
    const int64_t row = piece.start + rows * part / parts, next = piece.start + rows * (part + 1) / parts;
    passes.push({piece.mode, false, piece.whole, static_cast<int>(next - row), row, {piece.gamma}, {piece.keep}});
  }
}

template <class T>
void multiply_as(const Call& call) {
  static thread_local Scratch scratch;
  const int64_t groups = call.group_count;
  int64_t lists = 0, lined = 0, base_rows = call.rows;
  for (const Group* group = call.groups; group < call.groups + groups; group++) {
    base_rows -= group->rows;
    if (group->part.kind == kBitmap) continue;
    lists += (group->rows + kLine<T> - 1) / kLine<T>;
    lined += (group->rows + kLine<T> - kFew) / kLine<T>;
  }
  Job<T> job{call, {nullptr, round_up(call.in, kStep<T>) + kPad<T>}, {}, {}, {}, {}, {}, nullptr};
  const int64_t pieces = 2 * groups + 1, passes = 2 * call.rows, line = call.in * kLine<T>;
  const int64_t codes = call.rounds ? call.rows * call.in : 0;
  const int64_t rows = call.rows + 2 * (kMatrices<T> ? Lanes::matrix : 0);  // with those beyond the last
  const int64_t turned = kMatrices<T> ? rows * round_up(call.in, kStep<T>) : 0;
  scratch.reserve(rows * job.inputs.stride * sizeof(Input<T>) + (lined * line + turned) * sizeof(T) +
                      3 * pieces * sizeof(Piece) + passes * sizeof(Pass) + lists * sizeof(Listed<T>) + codes +
                      2 * codes / kInputs * sizeof(float),
                  11);
  job.inputs.x = scratch.take<Input<T>>(rows * job.inputs.stride);
  job.turned = scratch.take<T>(turned);
  T* lines = scratch.take<T>(lined * line);
  const auto room = [](auto* at) { return Many<std::remove_pointer_t<decltype(at)>>{at, at}; };
  job.panels = room(scratch.take<Piece>(pieces));
  job.blends = room(scratch.take<Piece>(pieces));
  job.products = room(scratch.take<Piece>(pieces));
  job.passes = room(scratch.take<Pass>(passes));
  job.listed = room(scratch.take<Listed<T>>(lists));

  const auto add = [&](const Piece& piece) {
    const int64_t rows = piece.stop - piece.start;
    if (kMatrices<T> && rows)
      job.products.push(piece);
    else if (rows >= (piece.mode == Mode::dense ? kManyDense : kMany))
      job.panels.push(piece);
    else if (rows)
      pass_over(piece, job.passes);
  };
  Piece dense{Mode::dense, 1.0f, nullptr, 0, base_rows, false};  // the rows of the base, and those of lists
  const Group *group = call.groups, *end = group + groups;
  for (; group < end && group->part.kind != kBitmap; dense.stop += group->rows, group++)
    for (int64_t start = dense.stop; start < dense.stop + group->rows; start += kLine<T>) {
      const int64_t stop = std::min(start + kLine<T>, dense.stop + group->rows);
      job.listed.push({group, start, stop, stop - start < kFew ? nullptr : lines});
      if (stop - start < kFew) continue;
      lay_out_lines(job, start, stop, lines);
      lines += line;
    }
  Rounded rounded{scratch.take<int8_t>(codes), scratch.take<float>(codes / kInputs), scratch.take<float>(codes / kInputs), 0, call.in};
  if constexpr (std::is_same_v<T, T16>)
    if (call.rounds)
      for (; rounded.rows < dense.stop; rounded.rows++) rounded.round(rounded.rows, job.input(rounded.rows));
  for (int64_t r = rounded.rows; r < call.rows; r++)
    lay_out(job.input(r), call.in, job.inputs.stride, job.inputs.x + r * job.inputs.stride);
  if (!rounded.rows) add(dense);
  for (int64_t row = dense.stop; group < end; row += group->rows, group++) {
    const bool soft = group->strength != 1.0f;
    Piece piece{soft && kScales<T> ? Mode::soft : Mode::hard, 1.0f - group->strength,
                static_cast<const uint8_t*>(group->part.data), row, row + group->rows, false};
    add(piece);
    if (piece.mode == Mode::soft || !soft) continue;
    job.blends.push(piece);
    add({Mode::dense, 1.0f, nullptr, piece.start, piece.stop, true});
  }

  if constexpr (kMatrices<T>) turn_inputs(job);
  const int64_t blocks = (call.out + kBlock - 1) / kBlock, worth = call.out * call.in / kWorthAThread;
  const int64_t shares = std::min({int64_t{call.threads}, std::max(int64_t{1}, worth), blocks});
  Shortage shortage;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(shares)) if (shares > 1)
  for (int64_t share = 0; share < shares; share++)
    shortage.watch([&] {
      run(job, rounded, blocks * share / shares * kBlock, std::min(blocks * (share + 1) / shares * kBlock, call.out));
    });
  shortage.report();
}

[[maybe_unused]] void multiply(const Call& call) {
  if (call.dtype == kFloat32)
    multiply_as<T32>(call);
  else
    multiply_as<T16>(call);
}

}  // namespace
