// x86-64 with AVX-512 F, BW, VL and DQ.
#include "lanes16.h"
#include "rows.h"
#include "tiles.h"

void multiply_avx512(const Call& call) { multiply(call); }
void attend_avx512(const AttentionCall& call) { attend(call); }
RowKernels rows_avx512(int32_t dtype) { return rows_of(dtype); }
