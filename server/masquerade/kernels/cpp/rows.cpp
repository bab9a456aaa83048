// What a decoder layer does to its rows between the products, and its gradients, for callers that do the rest.
#include <algorithm>

#include "call.h"

namespace {

constexpr int64_t kWorthAThread = 1 << 15;  // elements

// Calls `work(first, count)` for shares of `count` parts of a width, on several threads if that is worth it.
template <class Work>
void share(int64_t count, int64_t width, int32_t threads, const Work& work) {
  const int64_t worth = std::max(int64_t{1}, count * width / kWorthAThread);
  const int64_t shares = std::min({int64_t{threads}, worth, count});
  Shortage shortage;
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(shares)) if (shares > 1)
  for (int64_t part = 0; part < shares; part++) {
    const int64_t start = count * part / shares;
    shortage.watch([&] { work(start, count * (part + 1) / shares - start); });
  }
  shortage.report();
}

int64_t bytes_of(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }
const char* at(const void* from, int64_t bytes) { return static_cast<const char*>(from) + bytes; }
char* at(void* from, int64_t bytes) { return static_cast<char*>(from) + bytes; }

RowKernels find_rows(int32_t isa, int32_t dtype) {
#if defined(__x86_64__)
  if (isa >= kAvx512) return rows_avx512(dtype);
  if (isa == kAvx2) return rows_avx2(dtype);
#endif
  return rows_portable(dtype);
}

}  // namespace

extern "C" {
void masquerade_normalize(const void* x, const void* weight, void* y, int64_t rows, int64_t size, float eps, int32_t dtype,
                          int32_t isa, int32_t threads) {
  const RowKernels kernels = find_rows(isa, dtype);
  share(rows, size, threads, [&](int64_t first, int64_t count) {
    const int64_t start = first * size * bytes_of(dtype);
    kernels.normalize(at(x, start), weight, at(y, start), count, size, eps);
  });
}

void masquerade_normalize_back(const void* x, const void* weight, const void* above, void* dx, int64_t rows, int64_t size,
                               float eps, int32_t dtype, int32_t isa, int32_t threads) {
  const RowKernels kernels = find_rows(isa, dtype);
  share(rows, size, threads, [&](int64_t first, int64_t count) {
    const int64_t start = first * size * bytes_of(dtype);
    kernels.normalize_back(at(x, start), weight, at(above, start), at(dx, start), count, size, eps);
  });
}

void masquerade_rotate(void* x, const void* cos, const void* sin, int64_t rows, int64_t heads, int64_t size, int32_t dtype,
                       int32_t isa, int32_t threads) {
  const RowKernels kernels = find_rows(isa, dtype);
  share(rows, heads * size, threads, [&](int64_t first, int64_t count) {
    const int64_t start = first * size * bytes_of(dtype);
    kernels.rotate(at(x, start * heads), at(cos, start), at(sin, start), count, heads, size);
  });
}

void masquerade_gate(const void* gate, const void* up, void* y, int64_t count, int32_t dtype, int32_t isa,
                     int32_t threads) {
  const RowKernels kernels = find_rows(isa, dtype);
  share(count, 1, threads, [&](int64_t first, int64_t elements) {
    const int64_t start = first * bytes_of(dtype);
    kernels.multiply_gate(at(gate, start), at(up, start), at(y, start), elements);
  });
}

void masquerade_gate_back(const void* gate, const void* up, const void* above, void* dgate, void* dup, int64_t count,
                          int32_t dtype, int32_t isa, int32_t threads) {
  const RowKernels kernels = find_rows(isa, dtype);
  share(count, 1, threads, [&](int64_t first, int64_t elements) {
    const int64_t start = first * bytes_of(dtype);
    kernels.multiply_gate_back(at(gate, start), at(up, start), at(above, start), at(dgate, start), at(dup, start),
                               elements);
  });
}

void masquerade_add(const void* x, const void* added, void* y, float scale, int64_t count, int32_t dtype, int32_t isa,
                    int32_t threads) {
  const RowKernels kernels = find_rows(isa, dtype);
  share(count, 1, threads, [&](int64_t first, int64_t elements) {
    const int64_t start = first * bytes_of(dtype);
    kernels.add(at(x, start), at(added, start), at(y, start), scale, elements);
  });
}

int32_t masquerade_softmax(void* scores, const uint8_t* seen, int64_t rows, int64_t heads, int64_t queries,
                           int64_t positions, float scale, int32_t dtype, int32_t isa, int32_t threads) {
  const RowKernels kernels = find_rows(isa, dtype);
  return guard([&] {
    share(rows * heads, queries * positions, threads, [&](int64_t first, int64_t count) {
      for (int64_t head = first; head < first + count; head++)
        kernels.softmax(at(scores, head * queries * positions * bytes_of(dtype)), seen + head / heads * queries * positions,
                        queries, positions, scale);
    });
    return kDone;
  });
}

void masquerade_softmax_back(const void* shares, void* above, int64_t rows, int64_t positions, float scale, int32_t dtype,
                             int32_t isa, int32_t threads) {
  const RowKernels kernels = find_rows(isa, dtype);
  share(rows, positions, threads, [&](int64_t first, int64_t count) {
    const int64_t start = first * positions * bytes_of(dtype);
    kernels.softmax_back(at(shares, start), at(above, start), count, positions, scale);
  });
}

void masquerade_add_products(const void* a, const void* b, float* sums, int64_t count, int32_t dtype, int32_t isa,
                             int32_t threads) {
  const RowKernels kernels = find_rows(isa, dtype);
  share(count, 1, threads, [&](int64_t first, int64_t elements) {
    const int64_t start = first * bytes_of(dtype);
    kernels.add_products(at(a, start), at(b, start), sums + first, elements);
  });
}
}
