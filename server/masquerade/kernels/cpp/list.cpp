// Lays out lists, and reads them again. Built without any special instructions.
#include "list.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "product.h"

namespace {

// Calls `visit(at, output, step)` for each pruned weight of a block whose places and counts are known.
template <class T, class C, class Visit>
void visit_all(const Block<T, C>& block, const Visit& visit) {
  uint8_t outputs[kBlock];
  for (int64_t output = 0; output < kBlock; output++) outputs[block.places[output]] = output;
  int64_t at = 0;
  for (int64_t slice = 0; slice < kBlock; slice += kSlice)
    for (int64_t step = 0; step < block.counts[slice]; step++)
      for (int64_t lane = slice; lane < slice + kSlice && block.counts[lane] > step; lane++)
        visit(at++, outputs[lane], step);
}

template <class T, class C>
void write(const int32_t* offsets, const C* columns, const T* weight, int64_t out, int64_t in, void* to) {
  const List<T, C> list(to, out);
  int32_t line = 0;
  for (int64_t first = 0; first < out; first += kBlock, offsets += kBlock, weight += kBlock * in) {
    const int64_t outputs = std::min(kBlock, out - first), number = first / kBlock;
    list.entries[number] = {line, offsets[outputs] - offsets[0]};
    std::memset(list.data(number), 0, list.size(number));
    line += list.size(number) / kCacheLine;
    const Block<T, C> block = list[number];
    const auto count = [&](int64_t output) -> C {
      return output < outputs ? offsets[output + 1] - offsets[output] : 0;
    };
    uint8_t sorted[kBlock];
    std::iota(sorted, sorted + kBlock, uint8_t{0});
    std::stable_sort(sorted, sorted + kBlock, [&](auto a, auto b) { return count(a) > count(b); });
    for (int64_t place = 0; place < kBlock; place++) {
      block.places[sorted[place]] = place;
      block.counts[place] = count(sorted[place]);
    }
    visit_all(block, [&](int64_t at, int64_t output, int64_t step) {
      const C column = columns[offsets[output] + step];
      block.columns[at] = column;
      block.values[at] = weight[output * in + column];
    });
  }
}

template <class T, class C>
void read(void* from, int64_t out, int32_t* offsets, C* columns) {
  const List<T, C> list(from, out);
  *offsets = 0;
  for (int64_t first = 0; first < out; first += kBlock, offsets += kBlock) {
    const Block<T, C> block = list[first / kBlock];
    const int64_t outputs = std::min(kBlock, out - first);
    for (int64_t output = 0; output < outputs; output++)
      offsets[output + 1] = offsets[output] + block.counts[block.places[output]];
    visit_all(block, [&](int64_t at, int64_t output, int64_t step) {
      columns[offsets[output] + step] = block.columns[at];
    });
  }
}

// Calls `work` with a value of the types of a weight and of a column.
template <class Work>
void with_types(int64_t kind, int32_t dtype, const Work& work) {
  if (dtype == kFloat32)
    kind == kList16 ? work(float{}, uint16_t{}) : work(float{}, uint32_t{});
  else
    kind == kList16 ? work(uint16_t{}, uint16_t{}) : work(uint16_t{}, uint32_t{});
}

}  // namespace

extern "C" int64_t masquerade_list_size(int64_t kind, int32_t dtype, int64_t out, int64_t pruned) {
  int64_t size = 0;
  with_types(kind, dtype, [&](auto value, auto column) { size = List<decltype(value), decltype(column)>::bound(out, pruned); });
  return size;
}

extern "C" void masquerade_list_write(int64_t kind, int32_t dtype, const int32_t* offsets, const void* columns,
                                      const void* weight, int64_t out, int64_t in, void* list) {
  with_types(kind, dtype, [&](auto value, auto column) {
    write(offsets, static_cast<const decltype(column)*>(columns), static_cast<const decltype(value)*>(weight), out, in,
          list);
  });
}

extern "C" void masquerade_list_read(int64_t kind, int32_t dtype, void* list, int64_t out, int32_t* offsets,
                                     void* columns) {
  with_types(kind, dtype, [&](auto value, auto column) {
    read<decltype(value)>(list, out, offsets, static_cast<decltype(column)*>(columns));
  });
}
