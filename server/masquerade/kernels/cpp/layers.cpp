// Decoder layers as one call: their products and attention, and what is done to the rows between them. Built without any
// special instructions.
#include <algorithm>
#include <cstring>
#include <vector>

#include "call.h"

namespace {

constexpr int64_t kWorthAThread = 1 << 15;  // elements

RowKernels find_rows(int32_t isa, int32_t dtype) {
#if defined(__x86_64__)
  if (isa >= kAvx512) return rows_avx512(dtype);
  if (isa == kAvx2) return rows_avx2(dtype);
#endif
  return rows_portable(dtype);
}

class LayerCall {
 public:
  LayerCall(const Layer& layer, const Step& step, const Span* spans, int64_t count, int32_t isa, int32_t threads)
      : layer_(layer), step_(step), spans_(spans), count_(count), isa_(isa), threads_(threads),
        dtype_(static_cast<int32_t>(layer.dtype)), bytes_(dtype_ == kFloat32 ? 4 : 2), kernels_(find_rows(isa, dtype_)) {}

  // `number` is of the layer in the cache; x and y may be the same.
  int32_t run(int64_t number, const char* cos, const char* sin, const char* x, char* y) {
    static thread_local std::vector<char> normal, q, k, v, attended, gate, up, added;  // this thread's, from call to call
    char* const keys = static_cast<char*>(step_.keys) + number * step_.stride;
    char* const values = static_cast<char*>(step_.values) + number * step_.stride;
    normalize(x, layer_.input_norm, layer_.q.in, room(normal, layer_.q.in));
    multiply(layer_.q, normal, q);
    multiply(layer_.k, normal, k);
    multiply(layer_.v, normal, v);
    place(q.data(), layer_.heads, layer_.q_norm, cos, sin);
    place(k.data(), layer_.kv_heads, layer_.k_norm, cos, sin);
    write(k.data(), keys);
    write(v.data(), values);
    masquerade_attention(q.data(), keys, values, room(attended, layer_.o.in), step_.blocks, step_.starts, step_.chunk_rows,
                         step_.lengths, step_.chunks, layer_.heads, layer_.kv_heads, layer_.size, step_.width,
                         step_.positions, static_cast<float>(layer_.scale), dtype_, isa_, threads_);
    multiply(layer_.o, attended, added);
    add(x, added.data(), y);
    normalize(y, layer_.mlp_norm, layer_.gate.in, normal.data());
    multiply(layer_.gate, normal, gate);
    multiply(layer_.up, normal, up);
    multiply_gate(gate.data(), up.data());
    multiply(layer_.down, gate, added);
    add(y, added.data(), y);
    return outcome_;
  }

 private:
  char* room(std::vector<char>& memory, int64_t width) const {
    const size_t bytes = step_.rows * width * bytes_;
    if (memory.size() < bytes) memory.resize(bytes);
    return memory.data();
  }

  void multiply(const Linear& linear, const std::vector<char>& x, std::vector<char>& y) {
    const auto prunes = [&](const Span& span) { return span.parts[linear.number].kind != kNothing; };
    const int64_t count = std::any_of(spans_, spans_ + count_, prunes) ? count_ : 0;
    const int32_t outcome =
        masquerade_product(spans_, count, linear.number, linear.weight, linear.bias, x.data(), room(y, linear.out),
                           step_.rows, linear.out, linear.in, dtype_, static_cast<int32_t>(linear.form), isa_, threads_);
    if (outcome != kDone) outcome_ = outcome;
  }

  // Calls `work(first row, rows)`, on several threads if so many rows of a width are worth it.
  template <class Work>
  void share(int64_t width, const Work& work) const {
    const int64_t rows = step_.rows, worth = std::max(int64_t{1}, rows * width / kWorthAThread);
    const int64_t shares = std::min({int64_t{threads_}, worth, rows});
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(shares)) if (shares > 1)
    for (int64_t part = 0; part < shares; part++) {
      const int64_t start = rows * part / shares;
      work(start, rows * (part + 1) / shares - start);
    }
  }

  void normalize(const char* x, const void* weight, int64_t width, char* y) const {
    share(width, [&](int64_t at, int64_t rows) {
      const int64_t start = at * width * bytes_;
      kernels_.normalize(x + start, weight, y + start, rows, width, static_cast<float>(layer_.eps));
    });
  }

  // Norms and rotary positions of heads, in place.
  void place(char* heads, int64_t count, const void* norm, const char* cos, const char* sin) const {
    share(count * layer_.size, [&](int64_t at, int64_t rows) {
      const int64_t size = layer_.size, angles = at * size * bytes_;
      char* x = heads + angles * count;
      const auto normalize = [&] {
        if (norm) kernels_.normalize(x, norm, x, rows * count, size, static_cast<float>(layer_.eps));
      };
      if (!layer_.norms_rotated) normalize();
      if (layer_.rotates) kernels_.rotate(x, cos + angles, sin + angles, rows, count, size);
      if (layer_.norms_rotated) normalize();
    });
  }

  void write(const char* heads, char* cache) const {
    const int64_t bytes = layer_.size * bytes_;
    for (int64_t i = 0; i < step_.rows * layer_.kv_heads; i++)
      std::memcpy(cache + step_.slots[i] * bytes, heads + i * bytes, bytes);
  }

  void multiply_gate(char* gate, const char* up) const {
    const int64_t width = layer_.gate.out;
    share(width, [&](int64_t at, int64_t rows) {
      const int64_t start = at * width * bytes_;
      kernels_.multiply_gate(gate + start, up + start, rows * width);
    });
  }

  void add(const char* x, const char* added, char* y) const {
    const int64_t width = layer_.q.in;
    share(width, [&](int64_t at, int64_t rows) {
      const int64_t start = at * width * bytes_;
      kernels_.add(x + start, added + start, y + start, static_cast<float>(layer_.residual), rows * width);
    });
  }

  const Layer& layer_;
  const Step& step_;
  const Span* const spans_;
  const int64_t count_;
  const int32_t isa_, threads_, dtype_;
  const int64_t bytes_;
  const RowKernels kernels_;
  int32_t outcome_ = kDone;
};

}  // namespace

extern "C" int32_t masquerade_layers(const Layer* layers, int64_t first, int64_t number, const Step* step,
                                     const Span* spans, int64_t count, const void* cos, const void* sin, const void* x,
                                     void* y, int32_t isa, int32_t threads) {
  if (!(masquerade_isas() >> isa & 1)) return kNoIsa;
  if (!step->rows) return kDone;
  for (int64_t i = 0; i < number; i++) {
    LayerCall call(layers[i], *step, spans, count, isa, threads);
    const int32_t outcome = call.run(first + i, static_cast<const char*>(cos), static_cast<const char*>(sin),
                                     static_cast<const char*>(i ? y : x), static_cast<char*>(y));
    if (outcome != kDone) return outcome;
  }
  return kDone;
}
