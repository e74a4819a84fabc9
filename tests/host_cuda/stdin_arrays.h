// Arrays from standard input, for the programs here. Each has a heap block of its own size, so that
// the address sanitizer sees a step outside; the end of the program frees them.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// `misalign` is in elements.
template <class T>
T* read_array(int64_t count, int64_t misalign = 0) {
  T* memory = static_cast<T*>(std::malloc(sizeof(T) * static_cast<size_t>(count + misalign)));
  const size_t wanted = static_cast<size_t>(count);
  if (std::fread(memory + misalign, sizeof(T), wanted, stdin) != wanted) std::abort();
  return memory + misalign;
}

// For a result, filled with 0xFF: NaN in every float.
inline void* make_output(int64_t bytes) {
  void* memory = std::malloc(static_cast<size_t>(bytes));
  std::memset(memory, 0xFF, static_cast<size_t>(bytes));
  return memory;
}

inline void write_output(const void* memory, int64_t bytes) {
  std::fwrite(memory, 1, static_cast<size_t>(bytes), stdout);
}
