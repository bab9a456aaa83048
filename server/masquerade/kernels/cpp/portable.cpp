// Any processor: the compiler lowers eight lanes to whatever there is.
#include "lanes8.h"
#include "attention.h"
#include "tiles.h"

void multiply_portable(const Call& call) { multiply(call); }
void attend_portable(const AttentionCall& call) { attend(call); }
