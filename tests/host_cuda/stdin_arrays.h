// Reads arrays from standard input and writes results to standard output. Each array is its own
// allocation of exactly its size, so the address sanitizer notices a step outside. Nothing is freed
// before the program ends.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// `misalign` is a number of elements.
template <class T>
T* read_array(int64_t count, int64_t misalign = 0) {
  T* memory = static_cast<T*>(std::malloc(sizeof(T) * static_cast<size_t>(count + misalign)));
  const size_t wanted = static_cast<size_t>(count);
  if (std::fread(memory + misalign, sizeof(T), wanted, stdin) != wanted) std::abort();
  return memory + misalign;
}

// Allocates memory for a result, filled with 0xFF, which is NaN in every float type.
inline void* make_output(int64_t bytes) {
  void* memory = std::malloc(static_cast<size_t>(bytes));
  std::memset(memory, 0xFF, static_cast<size_t>(bytes));
  return memory;
}

inline void write_output(const void* memory, int64_t bytes) {
  std::fwrite(memory, 1, static_cast<size_t>(bytes), stdout);
}
