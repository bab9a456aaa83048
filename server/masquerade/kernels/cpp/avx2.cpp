// x86-64 with AVX2 and FMA.
#include "lanes8.h"
#include "rows.h"
#include "tiles.h"

void multiply_avx2(const Call& call) { multiply(call); }
void attend_avx2(const AttentionCall& call) { attend(call); }
RowKernels rows_avx2(int32_t dtype) { return rows_of(dtype); }
