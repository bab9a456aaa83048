// A call as the instruction sets' units take it: rows sorted by their masks' parts of one Linear.
#pragma once
#include <new>

#include "product.h"

namespace {

// Memory that the work of a parallel loop lacks: nothing may be thrown out of one.
class Shortage {
 public:
  template <class Work>
  void watch(const Work& work) {
    try {
      work();
    } catch (const std::bad_alloc&) {
      __atomic_store_n(&lacks_, true, __ATOMIC_RELAXED);
    }
  }
  void report() const {
    if (lacks_) throw std::bad_alloc();
  }

 private:
  bool lacks_ = false;
};

// Calls `work` for a caller in C.
template <class Work>
[[maybe_unused]] int32_t guard(const Work& work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // namespace

// Consecutive rows (in `Call::order`) with one mask at one strength. Lists come before bitmaps.
struct Group {
  Part part;
  float strength;  // 1 - gamma
  int64_t rows;
};

struct Call {
  const void *weight, *bias, *x;
  void* y;
  const int64_t* order;  // [rows]; null: as they are
  const Group* groups;   // of all rows but the base's, which come first
  int64_t group_count, rows, out, in;
  int32_t dtype, form, threads;
  bool rounds;  // inputs of rows without a bitmap, to 8 bits
};

struct AttentionCall {
  const void *q, *keys, *values;
  void* y;
  const int32_t *blocks, *starts, *rows, *lengths;
  int64_t chunks, heads, kv_heads, size, width, positions;
  float scale;
  int32_t dtype, threads;
};

// What is done to rows between products, and its gradients (rows.h), all in one dtype.
struct RowKernels {
  void (*normalize)(const void* x, const void* weight, void* y, int64_t rows, int64_t size, float eps);
  void (*normalize_back)(const void* x, const void* weight, const void* above, void* dx, int64_t rows, int64_t size,
                         float eps);
  void (*rotate)(void* x, const void* cos, const void* sin, int64_t rows, int64_t heads, int64_t size);
  void (*multiply_gate)(const void* gate, const void* up, void* y, int64_t count);
  void (*multiply_gate_back)(const void* gate, const void* up, const void* above, void* dgate, void* dup, int64_t count);
  void (*add)(const void* x, const void* added, void* y, float scale, int64_t count);
  void (*softmax)(void* scores, const uint8_t* seen, int64_t queries, int64_t positions, float scale);
  void (*softmax_back)(const void* shares, void* above, int64_t rows, int64_t positions, float scale);
  void (*add_products)(const void* a, const void* b, float* sums, int64_t count);
};

void multiply_portable(const Call&);
void multiply_avx2(const Call&);
void multiply_avx512(const Call&);
void multiply_avx512bf16(const Call&);  // of bf16 only
[[gnu::weak]] void multiply_amx(const Call&);  // of bf16 only; null if the compiler could not build it
void attend_portable(const AttentionCall&);
void attend_avx2(const AttentionCall&);
void attend_avx512(const AttentionCall&);
void attend_avx512bf16(const AttentionCall&);  // of bf16 only
[[gnu::weak]] void attend_amx(const AttentionCall&);  // as `multiply_amx`
RowKernels rows_portable(int32_t dtype);
RowKernels rows_avx2(int32_t dtype);
RowKernels rows_avx512(int32_t dtype);
