// x86-64 with what avx512bf16.cpp takes and AMX: products of bf16. What is between them is AVX-512's.
#include "lanes16.h"
#include "amx_attention.h"
#include "tiles.h"

void multiply_amx(const Call& call) {
  in_bands(call, [](const Call& band) { multiply_as<T16>(band); });
}
void attend_amx(const AttentionCall& call) { attend_as<T16, MatrixAttention>(call); }
