// x86-64 with AVX-512 F, BW, VL, DQ, VNNI and BF16: products of bf16. Those of fp32 are the AVX-512 unit's.
#include "lanes16.h"
#include "attention.h"
#include "tiles.h"

void multiply_avx512bf16(const Call& call) { multiply_as<T16>(call); }
void attend_avx512bf16(const AttentionCall& call) { attend_as<T16>(call); }
