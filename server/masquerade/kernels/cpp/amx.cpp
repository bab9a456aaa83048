// x86-64 with what avx512bf16.cpp takes and AMX: products of bf16. Attention and what is between is AVX-512's.
#include "lanes16.h"
#include "tiles.h"

void multiply_amx(const Call& call) {
  in_bands(call, [](const Call& band) { multiply_as<T16>(band); });
}
