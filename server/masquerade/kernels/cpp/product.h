// The C interface of the masked product; `native.py` mirrors it.
//
//   y_r = x_r (W * (M + gamma (1 - M)))^T + b     for every row r of a batch, each with a mask M and a gamma of its own
//
// A mask is laid out once, when it is loaded: a table with a part for every Linear of the model. A batch is laid out once
// for all Linears: spans of rows, each with a table and a strength. A call only adds the index of its Linear.
#pragma once
#include <cstdint>

constexpr int32_t kInterface = 12;  // changes whenever anything here does

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1 };
enum Form : int32_t {  // of a weight: of dtype, or quantised as GGUF has it
  kPlain = 0, kQ4_0 = 1, kQ4_1 = 2, kQ5_0 = 3, kQ5_1 = 4, kQ8_0 = 5, kQ4_K = 6, kQ5_K = 7, kQ6_K = 8
};
constexpr int32_t kRounds = 16;  // added to the form of a quantised weight: rows without a bitmap are rounded to 8 bits
enum Kind : int64_t { kNothing = 0, kList16 = 1, kList32 = 2, kBitmap = 3 };
enum Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
// No route: spans overlap or end beyond the batch. No memory: what was to be computed is undefined.
enum Outcome : int32_t { kDone = 0, kNoIsa = 1, kNoRoute = 2, kNoMemory = 3 };

// What a mask prunes of one Linear.
struct Part {
  int64_t kind;
  void* data;  // bitmap: keep, uint8 [out, 8 ceil(in / 64)]; list: as `masquerade_list_write` leaves it
};

// Rows `start` to `stop` of a batch have one mask at one strength.
struct Span {
  const Part* parts;  // of all Linears, by index
  double strength;    // 1 - gamma
  int64_t start, stop;
};

// A Linear of a layer.
struct Linear {
  const void *weight, *bias;  // [out, in] and [out] of the rows' dtype, or quantised if that is bf16; the bias may be null
  int64_t out, in, form, number;
};

// A decoder layer of Llama's structure. Norms are of the dtype of its rows.
struct Layer {
  Linear q, k, v, o, gate, up, down;
  const void *input_norm, *mlp_norm;  // [hidden]
  const void *q_norm, *k_norm;        // [size], or null
  int64_t dtype, heads, kv_heads, size;
  int64_t rotates, norms_rotated;  // whether heads have rotary positions, and are normalized after that
  double eps, scale, residual;     // `scale` is of the scores; `residual` multiplies what is added to the rows
};

// Where the rows of a step are in a paged cache: chunks as `masquerade_attention` takes them, and the slots of each row
// and head, [rows, kv_heads], in units of `size`.
struct Step {
  void *keys, *values;  // [layers, blocks, kv_heads, positions, size], of dtype
  const int64_t* slots;
  const int32_t *blocks, *starts, *chunk_rows, *lengths;
  int64_t chunks, width, positions, rows, stride;  // the last in bytes, from layer to layer
};

extern "C" {
int32_t masquerade_interface();
int32_t masquerade_isas();  // bit i is set if this processor runs `Isa` i

// Bytes of a list of so many pruned weights, however they are spread.
int64_t masquerade_list_size(int64_t kind, int32_t dtype, int64_t out, int64_t pruned);

// Lay out a list of the columns that are pruned, uint16 or uint32 [pruned] by kind, ascending within an output; `offsets`
// are of each output's first one, [out + 1]. Values are those of the weight, [out, in] of dtype, now.
void masquerade_list_write(int64_t kind, int32_t dtype, const int32_t* offsets, const void* columns, const void* weight,
                           int64_t out, int64_t in, void* list);
void masquerade_list_read(int64_t kind, int32_t dtype, void* list, int64_t out, int32_t* offsets, void* columns);

// A quantised weight is laid out once, when it is loaded (quantised.h). Its values are those of GGUF, rounded to bf16; as
// they are where inputs are rounded (rounded.h).
// `in` is a multiple of 32, with K of 256.
int64_t masquerade_quantised_size(int32_t form, int64_t out, int64_t in);  // bytes; a weight begins a cache line
// Lay out `count` outputs from `first` on, a multiple of 4, as so are `count` or the outputs end there; `blocks` are theirs.
void masquerade_quantised_write(int32_t form, const void* blocks, int64_t first, int64_t count, int64_t in, void* weight);
// The values of some outputs, bf16 [count, in].
void masquerade_quantised_read(int32_t form, const void* weight, const int64_t* outputs, int64_t count, int64_t in,
                               void* to);

// Spans are in any order; those of one mask and strength should follow one another. Rows of no span are the base's.
int32_t masquerade_product(const Span* spans, int64_t count, int64_t number,
                           const void* weight,  // [out, in], of dtype; or quantised, if dtype is bf16
                           const void* bias,    // [out] of dtype, or null
                           const void* x,       // [rows, in], of dtype
                           void* y,             // [rows, out], of dtype
                           int64_t rows, int64_t out, int64_t in, int32_t dtype, int32_t form, int32_t isa,
                           int32_t threads);

// Attention of rows that are consecutive positions of a request, chunk by chunk: the last row of a chunk attends to
// the first `lengths` positions of its blocks, the one before to one less. `heads` is a multiple of `kv_heads`, `size` of
// 16, and `positions`, those of a block, divide 64 and are a multiple of 4.
int32_t masquerade_attention(const void* q,           // [rows, heads, size], of dtype
                             const void* keys,        // [blocks, kv_heads, positions, size], of dtype
                             const void* values,      // the same
                             void* y,                 // as q
                             const int32_t* blocks,   // [chunks, width]: those of each, the rest is not read
                             const int32_t* starts,   // [chunks]: first rows
                             const int32_t* rows,     // [chunks], at least 1
                             const int32_t* lengths,  // [chunks], at least `rows`
                             int64_t chunks, int64_t heads, int64_t kv_heads, int64_t size, int64_t width,
                             int64_t positions, float scale, int32_t dtype, int32_t isa, int32_t threads);

// Layers from the one with the index `first` on. The keys and values of the rows are written into the cache. Products are
// `masquerade_product`'s, and attention is `masquerade_attention`'s.
int32_t masquerade_layers(const Layer* layers, int64_t first, int64_t number, const Step* step, const Span* spans,
                          int64_t count,
                          const void* cos,  // [rows, size], of dtype; null if no layer rotates
                          const void* sin,  // the same
                          const void* x,    // [rows, hidden], of dtype
                          void* y,          // the same
                          int32_t isa, int32_t threads);

// What layers do between products, and the gradients of that (rows.h). All elements are of dtype.
void masquerade_normalize(const void* x,       // [rows, size]
                          const void* weight,  // [size]
                          void* y,             // as x, or x itself
                          int64_t rows, int64_t size, float eps, int32_t dtype, int32_t isa, int32_t threads);
void masquerade_normalize_back(const void* x, const void* weight,
                               const void* above,  // the gradient of y
                               void* dx, int64_t rows, int64_t size, float eps, int32_t dtype, int32_t isa,
                               int32_t threads);
void masquerade_rotate(void* x,          // [rows, heads, size], in place
                       const void* cos,  // [rows, size]
                       const void* sin, int64_t rows, int64_t heads, int64_t size, int32_t dtype, int32_t isa,
                       int32_t threads);
void masquerade_gate(const void* gate, const void* up, void* y, int64_t count, int32_t dtype, int32_t isa,
                     int32_t threads);
void masquerade_gate_back(const void* gate, const void* up, const void* above, void* dgate, void* dup, int64_t count,
                          int32_t dtype, int32_t isa, int32_t threads);
void masquerade_add(const void* x, const void* added, void* y, float scale, int64_t count, int32_t dtype, int32_t isa,
                    int32_t threads);
// Of scores times `scale`, where `seen` is not 0; the others get 0.
int32_t masquerade_softmax(void* scores,         // [rows, heads, queries, positions], in place
                           const uint8_t* seen,  // [rows, queries, positions]
                           int64_t rows, int64_t heads, int64_t queries, int64_t positions, float scale, int32_t dtype,
                           int32_t isa, int32_t threads);  // its `Outcome`
void masquerade_softmax_back(const void* shares,  // [rows, positions], what `masquerade_softmax` made
                             void* above,         // their gradient; that of the scores takes its place
                             int64_t rows, int64_t positions, float scale, int32_t dtype, int32_t isa, int32_t threads);
void masquerade_add_products(const void* a, const void* b, float* sums, int64_t count, int32_t dtype, int32_t isa,
                             int32_t threads);
}
