// Decoder layers as one call: their products and attention, and what is done to the rows between them. Built without any
// special instructions.
#include <algorithm>
#include <cstring>
#include <vector>

#include "call.h"

namespace {

class LayerCall {
 public:
  LayerCall(const Layer& layer, const Step& step, const Span* spans, int64_t count, int32_t isa, int32_t threads)
      : layer_(layer), step_(step), spans_(spans), count_(count), isa_(isa), threads_(threads),
        dtype_(static_cast<int32_t>(layer.dtype)), bytes_(dtype_ == kFloat32 ? 4 : 2) {}

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
    note(masquerade_attention(q.data(), keys, values, room(attended, layer_.o.in), step_.blocks, step_.starts,
                              step_.chunk_rows, step_.lengths, step_.chunks, layer_.heads, layer_.kv_heads, layer_.size,
                              step_.width, step_.positions, static_cast<float>(layer_.scale), dtype_, isa_, threads_));
    multiply(layer_.o, attended, added);
    add(x, added, y);
    normalize(y, layer_.mlp_norm, layer_.gate.in, normal.data());
    multiply(layer_.gate, normal, gate);
    multiply(layer_.up, normal, up);
    masquerade_gate(gate.data(), up.data(), gate.data(), step_.rows * layer_.gate.out, dtype_, isa_, threads_);
    multiply(layer_.down, gate, added);
    add(y, added, y);
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
    note(masquerade_product(spans_, count, linear.number, linear.weight, linear.bias, x.data(), room(y, linear.out),
                            step_.rows, linear.out, linear.in, dtype_, static_cast<int32_t>(linear.form), isa_, threads_));
  }

  void note(int32_t outcome) {
    if (outcome != kDone) outcome_ = outcome;
  }

  void normalize(const char* x, const void* weight, int64_t width, char* y, int64_t vectors = 1) const {
    masquerade_normalize(x, weight, y, step_.rows * vectors, width, static_cast<float>(layer_.eps), dtype_, isa_, threads_);
  }

  // Norms and rotary positions of heads, in place.
  void place(char* heads, int64_t count, const void* norm, const char* cos, const char* sin) const {
    if (norm && !layer_.norms_rotated) normalize(heads, norm, layer_.size, heads, count);
    if (layer_.rotates) masquerade_rotate(heads, cos, sin, step_.rows, count, layer_.size, dtype_, isa_, threads_);
    if (norm && layer_.norms_rotated) normalize(heads, norm, layer_.size, heads, count);
  }

  void write(const char* heads, char* cache) const {
    const int64_t bytes = layer_.size * bytes_;
    for (int64_t i = 0; i < step_.rows * layer_.kv_heads; i++)
      std::memcpy(cache + step_.slots[i] * bytes, heads + i * bytes, bytes);
  }

  void add(const char* x, const std::vector<char>& added, char* y) const {
    masquerade_add(x, added.data(), y, static_cast<float>(layer_.residual), step_.rows * layer_.q.in, dtype_, isa_, threads_);
  }

  const Layer& layer_;
  const Step& step_;
  const Span* const spans_;
  const int64_t count_;
  const int32_t isa_, threads_, dtype_;
  const int64_t bytes_;
  int32_t outcome_ = kDone;
};

}  // namespace

extern "C" int32_t masquerade_layers(const Layer* layers, int64_t first, int64_t number, const Step* step,
                                     const Span* spans, int64_t count, const void* cos, const void* sin, const void* x,
                                     void* y, int32_t isa, int32_t threads) {
  if (!(masquerade_isas() >> isa & 1)) return kNoIsa;
  if (!step->rows) return kDone;
  return guard([&]() -> int32_t {
    for (int64_t i = 0; i < number; i++) {
      LayerCall call(layers[i], *step, spans, count, isa, threads);
      const int32_t outcome = call.run(first + i, static_cast<const char*>(cos), static_cast<const char*>(sin),
                                       static_cast<const char*>(i ? y : x), static_cast<char*>(y));
      if (outcome != kDone) return outcome;
    }
    return kDone;
  });
}
