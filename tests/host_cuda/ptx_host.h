// The functions of csrc/cuda/common/ptx.cuh on the CPU, as the PTX ISA (9.0) describes the
// instructions.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <new>
#include <source_location>

#include "common/float16.h"
#include "cuda_runtime_api.h"

namespace pylora::cuda {

// The place in a kernel that calls a function that reaches shared memory.
using Where = std::source_location;

template <class T>
T& shared_memory() {
  host_cuda::Cta& cta = *host_cuda::executor.current().cta;
  auto& memory = cta.static_memory;
  if (memory == nullptr) memory.reset(host_cuda::poisoned(sizeof(T), 256));
  cta.static_bytes = sizeof(T);
  return *std::launder(reinterpret_cast<T*>(memory.get()));
}

inline uint8_t* dynamic_shared_memory() {
  host_cuda::Cta& cta = *host_cuda::executor.current().cta;
  auto& memory = cta.dynamic_memory;
  if (memory == nullptr) memory.reset(host_cuda::poisoned(cta.grid->dynamic_bytes, 256));
  return memory.get();
}

template <class T>
T load_shared(const T* pointer, const Where& where = Where::current()) {
  host_cuda::access_shared(pointer, sizeof(T), "load", where);
  return *pointer;
}
inline uint32_t load_shared(const void* base, uint32_t offset,
                            const Where& where = Where::current()) {
  const uint8_t* pointer = static_cast<const uint8_t*>(base) + offset;
  return load_shared(reinterpret_cast<const uint32_t*>(pointer), where);
}
template <class T>
void store_shared(T* pointer, const T& value, const Where& where = Where::current()) {
  host_cuda::access_shared(pointer, sizeof(T), "store", where);
  *pointer = value;
  host_cuda::has_stored(pointer, sizeof(T));
}

inline uint4 load_streaming(const uint4* pointer) { return *pointer; }
inline void prefetch_to_l2(const void* pointer) {
  (void)*static_cast<const volatile uint8_t*>(pointer);  // a sanitizer checks the address
}
template <class T>
T load_from_l2(const T* pointer) {
  return *pointer;
}

// Shows `mine` to the warp, and returns what lane `from` shows.
template <class T>
T exchange(T mine, unsigned from, const char* operation) {
  static_assert(sizeof(T) <= sizeof(host_cuda::Warp::Lane::value));
  host_cuda::Warp& warp = host_cuda::warp();
  std::memcpy(&warp.lanes[host_cuda::lane()].value, &mine, sizeof(T));
  host_cuda::wait_at(warp.barrier, operation);
  std::memcpy(&mine, &warp.lanes[from].value, sizeof(T));
  host_cuda::wait_at(warp.barrier, operation);  // no lane may show its next value earlier
  return mine;
}

template <class T>
T shuffle(T value, int lane) {
  return exchange(value, static_cast<unsigned>(lane) % host_cuda::kLanes, "shuffle");
}
template <class T>
T shuffle_xor(T value, int mask) {
  return exchange(value, host_cuda::lane() ^ static_cast<unsigned>(mask), "shuffle_xor");
}

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const uint32_t which = selector >> 4 * i & 7;
    result |= (static_cast<uint32_t>(bytes >> 8 * which) & 0xFFu) << 8 * i;
  }
  return result;
}

template <class T>
uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (int i = 0; i < 32; i += 16) {
    const T left{static_cast<uint16_t>(a >> i)}, right{static_cast<uint16_t>(b >> i)};
    const T rounded = from_float<T>(to_float(left) * to_float(right));
    product |= static_cast<uint32_t>(rounded.bits) << i;
  }
  return product;
}

// The copy lands as late as it may, which is when its thread waits for it.
inline void copy_async_16(void* shared, const void* global, const Where& where = Where::current()) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    host_cuda::fail("cp.async of 16 bytes from or to an address that is no multiple of 16");
  }
  host_cuda::access_shared(shared, 16, "cp.async", where);
  host_cuda::executor.current().groups.back().push_back({shared, global});
}
inline void copy_async_commit() { host_cuda::executor.current().groups.emplace_back(); }
template <int kPending>
void copy_async_wait() {
  auto& groups = host_cuda::executor.current().groups;
  while (groups.size() > kPending + 1) {  // the open group is not waited for
    for (const host_cuda::AsyncCopy& copy : groups.front()) {
      std::memcpy(copy.shared, copy.global, 16);
      host_cuda::has_stored(copy.shared, 16);
    }
    groups.erase(groups.begin());
  }
}

// Each lane reads its row as soon as it arrives. Without a barrier before it, the lane may read too
// early.
inline void load_matrices(uint32_t (&out)[4], const void* row, bool transposed,
                          const Where& where) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    host_cuda::fail("ldmatrix of a row whose address is no multiple of 16");
  }
  host_cuda::Warp& warp = host_cuda::warp();
  const unsigned lane = host_cuda::lane();
  host_cuda::access_shared(row, 16, "ldmatrix", where);
  std::memcpy(warp.lanes[lane].row, row, 16);
  host_cuda::wait_at(warp.barrier, "ldmatrix");
  const unsigned group = lane / 4;
  const unsigned pair = 2 * (lane % 4);
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    const auto element = [&](unsigned r, unsigned c) -> uint32_t {
      return warp.lanes[8 * matrix + r].row[c];
    };
    const uint32_t first = transposed ? element(pair, group) : element(group, pair);
    const uint32_t second = transposed ? element(pair + 1, group) : element(group, pair + 1);
    out[matrix] = second << 16 | first;
  }
  host_cuda::wait_at(warp.barrier, "ldmatrix");
}
inline void load_matrices(uint32_t (&out)[4], const void* row,
                          const Where& where = Where::current()) {
  load_matrices(out, row, false, where);
}
// ldmatrix.trans, which only the toy kernels that test the executor use.
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row,
                                     const Where& where = Where::current()) {
  load_matrices(out, row, true, where);
}

template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host_cuda::Warp& warp = host_cuda::warp();
  const unsigned lane = host_cuda::lane();
  host_cuda::Warp::Lane& mine = warp.lanes[lane];
  const auto half_of = [](uint32_t word, unsigned i) {
    return to_float(T{static_cast<uint16_t>(word >> 16 * i)});
  };
  for (unsigned i = 0; i < 8; ++i) mine.a[i] = half_of(a[i / 2], i % 2);
  for (unsigned i = 0; i < 4; ++i) mine.b[i] = half_of(i < 2 ? b0 : b1, i % 2);
  host_cuda::wait_at(warp.barrier, "mma");
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8;
    const unsigned column = lane % 4 * 2 + i % 2;
    double sum = 0.0;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned quarter = k % 8 / 2;  // the lane of the group that holds this k
      const float left = warp.lanes[row % 8 * 4 + quarter].a[k / 8 * 4 + row / 8 * 2 + k % 2];
      const float right = warp.lanes[column * 4 + quarter].b[k / 8 * 2 + k % 2];
      sum += static_cast<double>(left) * right;
    }
    d[i] += static_cast<float>(sum);
  }
  host_cuda::wait_at(warp.barrier, "mma");
}

inline void start_dependent_kernel() {}
inline void wait_for_previous_kernel() { host_cuda::wait_for_previous_grid(); }

}  // namespace pylora::cuda
