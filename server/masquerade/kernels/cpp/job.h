// What a product is made of: element types, memory, and the work that a call comes to. See tiles.h for how it is done.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "call.h"
#include "dequantise.h"
#include "list.h"

namespace {

constexpr int kTile = 4;           // outputs of a tile
constexpr int64_t kPanel = 16;     // outputs of a panel: what is unpacked and used for many rows
constexpr int64_t kRow = kBlock + 16;  // floats of a row of a block: a tile may begin with the last output
constexpr int64_t kChunk = 2048;   // inputs of a tile that is multiplied straight from the weights
constexpr int64_t kLong = 4096;    // bytes of a row that memory is ahead of by itself
constexpr int kInOrder = 2;        // most rows whose outputs are computed one after the other
constexpr int64_t kNear = 4096;    // bytes that are fetched into the first cache; more go to the second
template <class T>
constexpr int64_t kDepth = 512 * Lanes::width / sizeof(Lanes::Input<T>);  // inputs of a panel
template <class T>
constexpr int64_t kApart = std::max(kChunk, kDepth<T>) + 32;  // of the outputs of a tile that is dequantised
constexpr int64_t kBand = 264;     // rows whose accumulators are kept from one depth to the next
constexpr int64_t kMany = 8;       // from so many rows of a mask on, its weights are unpacked into panels
constexpr int64_t kManyDense = 24;          // the same for weights as they are
constexpr int64_t kFew = 4;                 // from so many rows of a list on, their inputs are transposed
constexpr int64_t kWorthAThread = 1 << 15;  // weights

using F = Lanes::F;
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
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, quiet = bits >> 16 | 0x40u;
  *to = static_cast<T16>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// A step is what one load of keep bits covers, a few vectors: of fp32 weights in their order, or the even and the odd
// ones of a vector of bf16. Inputs are laid out alike.
template <class T>
constexpr int kStep = Lanes::step<T>;
template <class T>
using Input = Lanes::Input<T>;  // what inputs and unpacked weights are kept as
template <class T>
using Vector = decltype(Lanes::load(std::declval<const Input<T>*>()));
template <class T>
constexpr int kVector = kStep<T> / Lanes::parts<T>;  // inputs in a vector
template <class T>
constexpr int64_t kPad = kCacheLine / sizeof(Input<T>);  // inputs in a cache line
template <class T>
constexpr bool kMatrices = Lanes::matrix && std::is_same_v<T, T16>;  // products are those of matrix registers
template <class T>
constexpr bool kScales = std::is_same_v<Input<T>, float>;  // weights, in registers; else two products are blended

// Memory that a thread keeps from call to call, handed out piece by piece, each on a cache line of its own.
class Scratch {
 public:
  // Forget what was handed out; there is room for so many bytes in so many pieces.
  void reserve(int64_t bytes, int64_t pieces) {
    const int64_t size = round_up(bytes, kCacheLine) + kCacheLine * pieces;
    if (size > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<char*>(std::aligned_alloc(kCacheLine, size));
      if (!data_) throw std::bad_alloc();
      size_ = size;
    }
    used_ = 0;
  }
  template <class X>
  X* take(int64_t count) {
    X* piece = reinterpret_cast<X*>(data_ + used_);
    used_ += round_up(count * sizeof(X), kCacheLine);
    return piece;
  }
  ~Scratch() { std::free(data_); }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

// Rows (in sorted order) that are multiplied with the same effective weights.
struct Piece {
  Mode mode;
  float gamma;
  const uint8_t* keep;
  int64_t start, stop;
  bool whole;  // what is blended with the product of the mask, beside it
};

// Rows that are multiplied at once, straight from the weights: with one mask, or each with its own.
struct Pass {
  static constexpr int most = Lanes::rows;
  Mode mode;
  bool each, whole;
  int rows;
  int64_t row;
  float gamma[most];
  const uint8_t* keep[most];
};

// Rows of one list, whose pruned weights are taken from the dense product.
template <class T>
struct Listed {
  const Group* group;
  int64_t start, stop;
  const T* lines;  // inputs as [in, kLine], zero-padded, where several rows share the list; else null
};

template <class X>
struct Many {
  X *begin_, *end_;
  X* begin() const { return begin_; }
  X* end() const { return end_; }
  int64_t size() const { return end_ - begin_; }
  void push(const X& one) { *end_++ = one; }
};

template <class T>
struct Inputs {
  Input<T>* x;     // [rows, stride]
  int64_t stride;  // of the rows, in steps and a cache line, lest all fall on the same lines of the cache
};

template <class T>
void lay_out(const T* from, int64_t in, int64_t stride, Input<T>* to) {
  if constexpr (std::is_same_v<T, Input<T>>) {
    std::memcpy(to, from, in * sizeof(T));
    std::fill(to + in, to + stride, T{});
    return;
  }
  constexpr int step = kStep<T>, width = Lanes::width;
  for (int64_t k = 0; k < in; k += step)
    for (int i = 0; i < step; i++) {
      const int at = i % 2 * width + i / 2;
      to[k + at] = k + i < in ? widen(from[k + i]) : 0.0f;
    }
  std::fill(to + round_up(in, step), to + stride, 0.0f);  // a step of fp32 may be longer, and zeros times NaN are NaN
}

// Where an output's input 0 is, or would be, and how far outputs are apart.
template <class T>
struct Weights {
  const T* at;
  int64_t apart;
};

template <class T>
struct Job {
  const Call& call;
  Inputs<T> inputs;
  Many<Pass> passes;        // rows that few share weights with
  Many<Piece> panels;       // and those that many do
  Many<Piece> products;     // all of them, where registers are matrices (amx.h)
  Many<Piece> blends;       // rows whose product is made of two
  Many<Listed<T>> listed;
  T* turned;                // inputs of products with few rows

  // Weights of the outputs of a tile, or of its rest, for some inputs; `room` takes those of a tile that is quantised.
  Weights<T> weights(int64_t output, int64_t start, int64_t stop, T* room, int64_t stride) const {
    if constexpr (std::is_same_v<T, T16>)
      if (call.form != kPlain) {
        with_form(call.form, [&](auto form) { dequantise_to<form.value>(tile(output), start, stop, room, stride); });
        return {room + output % kTile * stride - start, stride};
      }
    return {weight(output), call.in};
  }
  QuantisedTile tile(int64_t output) const { return {Quantisation(call.form), call.weight, output, call.in}; }
  // Where the weights of a tile are in memory, and their bytes.
  const char* memory(int64_t output) const {
    const int64_t tile = output / kTile;
    return static_cast<const char*>(call.weight) + tile * tile_bytes() + output % kTile * call.in * sizeof(T);
  }
  int64_t tile_bytes() const {
    return call.form == kPlain ? kTile * call.in * sizeof(T) : Quantisation(call.form).tile(call.in);
  }
  const T* weight(int64_t output) const { return static_cast<const T*>(call.weight) + output * call.in; }
  const T* input(int64_t row) const { return static_cast<const T*>(call.x) + place(row) * call.in; }
  T* result(int64_t row) const { return static_cast<T*>(call.y) + place(row) * call.out; }
  int64_t place(int64_t row) const { return call.order ? call.order[row] : row; }
  int64_t keep_stride() const { return round_up(call.in, 64) / 8; }
};

// A block of outputs that is computed, corrected and written together: fp32 sums as [rows, kRow].
struct Stage {
  float *sums, *whole;  // of all rows; `whole` has those of the weights as they are, to blend in
  int64_t first, last;  // outputs

  float* of(bool dense, int64_t row, int64_t output) const {
    return (dense ? whole : sums) + row * kRow + output - first;
  }
};

// What comes next from memory, fetched evenly while there is something to compute; `apart` is the distance of what is
// fetched, in bytes.
struct Ahead {
  const char *at, *end;
  int64_t apart, count;  // of those at once
  bool near;

  Ahead(const void* from, int64_t bytes, int64_t times, int64_t apart = kCacheLine)
      : at(static_cast<const char*>(from)), end(at + bytes), apart(apart),
        count((bytes + apart * times - 1) / (apart * times)), near(bytes <= kNear) {}

  inline __attribute__((always_inline)) void fetch() {
    for (int64_t one = 0; one < count && at < end; one++, at += apart)
      near ? __builtin_prefetch(at, 0, 3) : __builtin_prefetch(at, 0, 2);
  }
};

// Which inputs a tile is multiplied with at once, and what becomes of its accumulators.
struct Reach {
  int64_t start, stop;
  bool fresh, done;  // whether these are the first, the last inputs
  float* totals;     // [n, kTile, width]: from one reach to the next
  float* sums;       // [n, kRow]: of the last

  template <int n>
  inline __attribute__((always_inline)) void begin(F (&total)[kTile][n]) const {
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
#pragma GCC unroll 4
      for (int m = 0; m < kTile; m++)
        total[m][r] = fresh ? Lanes::fill(0.0f) : Lanes::load(totals + (r * kTile + m) * Lanes::width);
  }
  template <int n>
  inline __attribute__((always_inline)) void end(const F (&total)[kTile][n]) const {
#pragma GCC unroll 8
    for (int r = 0; r < n; r++)
      if (done)
        Lanes::reduce(total[0][r], total[1][r], total[2][r], total[3][r], sums + r * kRow);
      else
#pragma GCC unroll 4
        for (int m = 0; m < kTile; m++) Lanes::store(totals + (r * kTile + m) * Lanes::width, total[m][r]);
  }
};

template <int n, class Add>
inline __attribute__((always_inline)) void each_of(const Add& add) {
  add(std::integral_constant<int, 0>{});
  if constexpr (n > 1) add(std::integral_constant<int, 1>{});
  if constexpr (n > 2) add(std::integral_constant<int, 2>{}), add(std::integral_constant<int, 3>{});
}

}  // namespace
