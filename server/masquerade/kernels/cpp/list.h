// A mask's list of one Linear as it is multiplied: pruned weights with their values, so that the weights that a list is
// subtracted from are not looked for again.
//
// Outputs come in blocks of kBlock, all of whose data is together, because it is read once a step, from memory. Within a
// block those with the most pruned weights come first. kSlice of them are a slice, whose pruned weights lie step by
// step: the first of each output, then the second of each that has two, and so on. As counts descend, those with one
// more weight are always the first lanes.
#pragma once
#include <cstdint>

namespace {

constexpr int64_t kBlock = 64;
constexpr int64_t kSlice = 16;
constexpr int64_t kCacheLine = 64;  // bytes

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// One block of a list.
template <class T, class C>
struct Block {
  C* counts;        // [kBlock], descending
  uint8_t* places;  // [kBlock]: where an output's count is among them
  T* values;        // [pruned]
  C* columns;       // [pruned], and kSlice that are 0: a step may be loaded whole, as its values may

  Block(char* data, int64_t pruned)
      : counts(reinterpret_cast<C*>(data)), places(reinterpret_cast<uint8_t*>(counts + kBlock)),
        values(reinterpret_cast<T*>(places + kBlock)),
        columns(reinterpret_cast<C*>(places + kBlock + round_up(pruned * sizeof(T), sizeof(C)))) {}

  // Bytes; a block begins a cache line.
  static int64_t size(int64_t pruned) {
    const int64_t weights = round_up(pruned * sizeof(T), sizeof(C)) + pruned * sizeof(C);
    return round_up(kBlock * (sizeof(C) + 1) + weights + kSlice * sizeof(T) + kSlice * sizeof(C), kCacheLine);
  }
};

template <class T, class C>
struct List {
  struct Entry {
    int32_t line, pruned;  // where the block is, in cache lines from the list's end of entries, and its pruned weights
  };
  Entry* entries;  // [blocks]
  char* first;

  List(void* data, int64_t out)
      : entries(static_cast<Entry*>(data)), first(static_cast<char*>(data) + head(out)) {}

  char* data(int64_t block) const { return first + entries[block].line * kCacheLine; }
  Block<T, C> operator[](int64_t block) const { return {data(block), entries[block].pruned}; }
  int64_t size(int64_t block) const { return Block<T, C>::size(entries[block].pruned); }

  static int64_t count_blocks(int64_t out) { return (out + kBlock - 1) / kBlock; }
  static int64_t head(int64_t out) { return round_up(count_blocks(out) * sizeof(Entry), kCacheLine); }
  // Bytes that are enough, however so many pruned weights are shared out.
  static int64_t bound(int64_t out, int64_t pruned) {
    const int64_t each = Block<T, C>::size(0) + kCacheLine + sizeof(C);
    return round_up(head(out) + count_blocks(out) * each + pruned * (sizeof(T) + sizeof(C)), kCacheLine);
  }
};

}  // namespace
