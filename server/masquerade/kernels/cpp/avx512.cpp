// x86-64 with AVX-512 F, BW, VL and DQ.
#include "lanes16.h"
#include "attention.h"
#include "tiles.h"

void multiply_avx512(const Call& call) { multiply(call); }
void attend_avx512(const AttentionCall& call) { attend(call); }
