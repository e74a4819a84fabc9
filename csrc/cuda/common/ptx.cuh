// Wrappers of the instructions that CUDA C++ does not offer. Inline PTX is only here and, for
// sm_90a, in hopper/ptx.cuh. tests/host_cuda/ptx_host.h has the same functions for the CPU, written
// from the PTX ISA, so that the kernels run there as they are.
//
// Every function that a whole warp must call together says so.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#if !defined(__CUDACC__)
#include "ptx_host.h"
#else

namespace pylora::cuda {

// The CTA's static shared memory as a T. A kernel calls this once. T must have no constructor.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  __shared__ T memory;
  return memory;
}

// The dynamic shared memory that the launch asked for. It is aligned to 256 bytes.
__device__ __forceinline__ uint8_t* dynamic_shared_memory() {
  extern __shared__ __align__(256) uint8_t dynamic_memory[];
  return dynamic_memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A load from shared memory and a store to it. They compile to plain accesses. On the host they
// tell the executor which bank each lane wants and which thread has written a byte.
template <class T>
__device__ __forceinline__ T load_shared(const T* pointer) {
  return *pointer;
}
template <class T>
__device__ __forceinline__ void store_shared(T* pointer, T value) {
  *pointer = value;
}

// A load from `base` + `offset`. `base` must be the same in every lane: it then stays in a uniform
// register, and no lane adds it.
__device__ __forceinline__ uint32_t load_shared(const void* base, uint32_t offset) {
  uint32_t value;
  asm("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(shared_address(base) + offset));
  return value;
}

// A load of data that is read once. It bypasses L1, where it would push out what is read again.
__device__ __forceinline__ uint4 load_streaming(const uint4* pointer) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(pointer));
  return v;
}

__device__ __forceinline__ void prefetch_to_l2(const void* pointer) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

// A load of what another CTA of the same launch has written. It reads from L2, since L1 may hold an
// older value.
template <class T>
__device__ __forceinline__ T load_from_l2(const T* pointer) {
  return __ldcg(pointer);
}

// Whole warp. `shuffle` returns the value of lane `lane` % 32, and `shuffle_xor` that of the lane
// whose number differs from this one in the bits of `mask`.
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xFFFFFFFFu, value, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

// prmt: byte i of the result is byte (selector >> 4 * i) & 7 of the 8 bytes {high, low}.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// The products of two pairs of T, each rounded to T.
template <class T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t multiply_pairs<__half>(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
template <>
__device__ __forceinline__ uint32_t multiply_pairs<__nv_bfloat16>(uint32_t a, uint32_t b) {
  uint32_t product;  // sm_80 has no mul of bf16; an fma that adds -0 gives the same result
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  return product;
}

// Copies 16 bytes from global to shared memory without going through registers. They may be read
// after commit, wait and a barrier.
//
// It has no cache policy: where the shared address has a uniform part, ptxas 13.0 for sm_90a names
// registers for the policy that hold something else, and the GPU stops with an illegal instruction.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}
// `commit` closes a group of this thread's copies. `wait` waits until at most `kPending` groups are
// under way.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Whole warp. Loads four matrices of 8 rows by 16 bytes. Lane l gives the address of row l % 8 of
// matrix l / 8. Its register i gets bytes 4 (l % 4) to 4 (l % 4) + 3 of row l / 4 of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// Whole warp. d += A B with A [16, 16] and B [16, 8] of T, and d [16, 8] in fp32. With g = lane / 4
// and t = lane % 4, each register of A or B holds two elements, at k = 2t and 2t + 1 unless it says
// k + 8:
//   a[0] row g, a[1] row g + 8, a[2] row g and k + 8, a[3] row g + 8 and k + 8
//   b0 column g, b1 column g and k + 8
//   d[0], d[1] row g, columns 2t and 2t + 1; d[2], d[3] the same of row g + 8
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1);
template <>
__device__ __forceinline__ void mma_16x8x16<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                    uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_16x8x16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                           uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Programmatic dependent launch, on sm_90 and later. (Before, a kernel starts when the previous one
// has ended, and both functions do nothing.) The first lets the next kernel of the stream start.
// The second waits until the previous kernel has ended and its results are visible.
__device__ __forceinline__ void start_dependent_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace pylora::cuda

#endif
