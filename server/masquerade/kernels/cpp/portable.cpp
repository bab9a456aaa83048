// Any processor: the compiler lowers eight lanes to whatever there is.
#include "lanes8.h"
#include "rows.h"
#include "tiles.h"

void multiply_portable(const Call& call) { multiply(call); }
void attend_portable(const AttentionCall& call) { attend(call); }
RowKernels rows_portable(int32_t dtype) { return rows_of(dtype); }
