// Sorts the rows of a call, and chooses among the instruction sets that were compiled in. Built without any special
// instructions.
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <vector>

#include "call.h"

namespace {

// The rows of a batch sorted by their masks' part of one Linear: nothing, lists, bitmaps. Reused from call to call.
class Arrangement {
 public:
  const int64_t* order() const { return order_.data(); }
  const std::vector<Group>& groups() const { return groups_; }

  // False if spans overlap or end beyond the rows.
  bool arrange(const Span* spans, int64_t count, int64_t number, int64_t rows) {
    order_.clear();
    groups_.clear();
    masked_.assign(rows, false);
    for (const Span* span = spans; span < spans + count; span++) {
      if (span->start < 0 || span->start > span->stop || span->stop > rows) return false;
      for (int64_t row = span->start; row < span->stop; row++) {
        if (masked_[row]) return false;
        masked_[row] = true;
      }
    }
    for (int64_t row = 0; row < rows; row++)
      if (!masked_[row]) order_.push_back(row);
    for (int rank = 0; rank < 3; rank++)
      for (const Span* span = spans; span < spans + count; span++)
        if (const Part& part = span->parts[number]; rank_of(part) == rank) add(*span, part);
    return true;
  }

 private:
  static int rank_of(const Part& part) { return part.kind == kNothing ? 0 : part.kind == kBitmap ? 2 : 1; }

  void add(const Span& span, const Part& part) {
    for (int64_t row = span.start; row < span.stop; row++) order_.push_back(row);
    if (part.kind == kNothing) return;
    const float strength = static_cast<float>(span.strength);
    if (groups_.empty() || groups_.back().part.data != part.data || groups_.back().strength != strength)
      groups_.push_back({part, strength, 0});
    groups_.back().rows += span.stop - span.start;
  }

  std::vector<int64_t> order_;
  std::vector<Group> groups_;
  std::vector<char> masked_;
};

#if defined(__x86_64__)
// Whether AMX for bf16 was built, the processor has it, and the system lets this process use its registers, which Linux
// does for those that ask.
bool may_use_matrices() {
  static const bool may = [] {
    constexpr long kRequest = 0x1023, kTiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    unsigned a, b, c, d;
    if (!multiply_amx || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool has = d >> 22 & 1 && d >> 24 & 1;  // AMX-BF16, AMX-TILE
    return has && syscall(SYS_arch_prctl, kRequest, kTiles) == 0;
  }();
  return may;
}
#endif

}  // namespace

extern "C" int32_t masquerade_interface() { return kInterface; }

extern "C" int32_t masquerade_isas() {
  int32_t isas = 1 << kPortable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) isas |= 1 << kAvx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    isas |= 1 << kAvx512;
  if (isas >> kAvx512 & 1 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    isas |= 1 << kAvx512Bf16;
  if (isas >> kAvx512Bf16 & 1 && may_use_matrices()) isas |= 1 << kAmx;
#endif
  return isas;
}

extern "C" int32_t masquerade_product(const Span* spans, int64_t count, int64_t number, const void* weight,
                                      const void* bias, const void* x, void* y, int64_t rows, int64_t out, int64_t in,
                                      int32_t dtype, int32_t form, int32_t isa, int32_t threads) {
  if (!(masquerade_isas() >> isa & 1)) return kNoIsa;
  if (!rows) return kDone;
  const bool rounds = form & kRounds;
  Call call{weight, bias, x, y, nullptr, nullptr, 0, rows, out, in, dtype, form & ~kRounds, threads, rounds};
  if (rounds && isa == kAvx512) isa = kAvx2;  // it has no sums of integers
  return guard([&]() -> int32_t {
    static thread_local Arrangement arrangement;
    if (count) {
      if (!arrangement.arrange(spans, count, number, rows)) return kNoRoute;
      call.order = arrangement.order();
      call.groups = arrangement.groups().data();
      call.group_count = static_cast<int64_t>(arrangement.groups().size());
    }
    switch (isa) {
#if defined(__x86_64__)
      case kAmx: dtype == kBfloat16 ? multiply_amx(call) : multiply_avx512(call); break;
      case kAvx512Bf16: dtype == kBfloat16 ? multiply_avx512bf16(call) : multiply_avx512(call); break;
      case kAvx512: multiply_avx512(call); break;
      case kAvx2: multiply_avx2(call); break;
#endif
      default: multiply_portable(call);
    }
    return kDone;
  });
}

extern "C" int32_t masquerade_attention(const void* q, const void* keys, const void* values, void* y,
                                        const int32_t* blocks, const int32_t* starts, const int32_t* rows,
                                        const int32_t* lengths, int64_t chunks, int64_t heads, int64_t kv_heads,
                                        int64_t size, int64_t width, int64_t positions, float scale, int32_t dtype,
                                        int32_t isa, int32_t threads) {
  if (!(masquerade_isas() >> isa & 1)) return kNoIsa;
  const AttentionCall call{q,     keys,     values, y,     blocks,    starts, rows,  lengths, chunks,
                           heads, kv_heads, size,   width, positions, scale,  dtype, threads};
  return guard([&]() -> int32_t {
    switch (isa) {
#if defined(__x86_64__)
      case kAmx: dtype == kBfloat16 ? attend_amx(call) : attend_avx512(call); break;
      case kAvx512Bf16: dtype == kBfloat16 ? attend_avx512bf16(call) : attend_avx512(call); break;
      case kAvx512: attend_avx512(call); break;
      case kAvx2: attend_avx2(call); break;
#endif
      default: attend_portable(call);
    }
    return kDone;
  });
}
