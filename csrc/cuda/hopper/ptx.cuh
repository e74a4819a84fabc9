// What sm_90a has below CUDA C++ beyond ptx.cuh: barriers in shared memory that count bytes, the
// copy engine for tiles of tensors (TMA), and matrix products of a whole warpgroup (WGMMA). The
// second and last file with inline PTX; its twin for the CPU is tests/host_cuda/ptx_hopper_host.h.
//
// A warpgroup is four warps, the first of them a multiple of four. Every function that a whole warp
// or warpgroup must call together says so.
#pragma once

#include <type_traits>

#include "common/nf4.h"
#include "cuda/common/ptx.cuh"

// Whether this pass of the compiler has these instructions: kernels have no body where it has not.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PYLORA_SM90A 1
#else
#define PYLORA_SM90A 0
#endif

namespace pylora::cuda {

enum class Swizzle { k32, k128 };  // bytes; which 16-byte units of a tile change places

// Describes a matrix in global memory and the tile that one copy brings: tensor_map.cuh fills it.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// A tile in shared memory as B of a product: tokens of 128 bytes along k, swizzled by 128 bytes as
// copy_tile leaves them, aligned to 1024 bytes. This is the PTX ISA's matrix descriptor.
struct SharedOperand {
  uint64_t descriptor;

  // `address` is in the shared window.
  static PYLORA_HOST_DEVICE constexpr SharedOperand at(uint32_t address) {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
    constexpr uint64_t kEightTokens = uint64_t{1024 >> 4} << 32;  // to the next group of 8
    constexpr uint64_t kLeading = uint64_t{1} << 16;              // not used with this swizzle
    return {kSwizzle128 | kEightTokens | kLeading | (address & 0x3FFFF) >> 4};
  }

  // `bytes` further along k, a multiple of 16.
  PYLORA_HOST_DEVICE constexpr SharedOperand behind(int bytes) const {
    return {descriptor + (bytes >> 4)};
  }
};

// Completes a phase when so many threads have arrived, and so many bytes have come, as it expects.
using Barrier = uint64_t;

}  // namespace pylora::cuda

#if !defined(__CUDACC__)
#include "ptx_hopper_host.h"
#elif PYLORA_SM90A

namespace pylora::cuda {

// dynamic_shared_memory() at an address that tiles with a swizzle of 128 bytes may have.
__device__ __forceinline__ uint8_t* tiled_shared_memory() {
  extern __shared__ __align__(1024) uint8_t tiled_memory[];
  return tiled_memory;
}

// Whole warpgroup, all warpgroups of the CTA: what one gives another gets. Multiples of 8.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Whole warp. Whether it is true in any lane; the compiler knows that all have the same answer, and
// keeps what depends on it in uniform registers.
__device__ __forceinline__ bool any_lane(bool value) { return __any_sync(0xFFFFFFFFu, value); }

// Barrier `id` (1 to 15; 0 is __syncthreads) for as many threads of the CTA, whole warps.
template <int kThreads>
__device__ __forceinline__ void named_barrier(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// One thread; the others may use the barrier after init_fence and __syncthreads.
__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// So that the copy engine sees it as well.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives, and adds to the bytes that the phase waits for.
__device__ __forceinline__ void barrier_arrive_expect(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of this parity is complete: phases are numbered from 0, and before the first one
// the phase of parity 1 counts as complete.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@!complete bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// One thread. The tile whose first element is at (row, column) to `shared`; what lies outside the
// matrix is 0. All bytes of the tile are counted at `barrier`, those as well.
__device__ __forceinline__ void copy_tile(void* shared, const TensorMap& map, int row, int column,
                                          Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// Each thread that has written shared memory with ordinary stores (stmatrix and cp.async count as
// such), before the barrier behind which the copy engine or a product reaches those bytes: their
// path to shared memory is another one, on which the stores become visible only now.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Whole warp. The inverse of load_matrices_transposed: lane l gives the address of row l % 8 of
// matrix l / 8, and holds in register i the elements 2 * (l % 4) and the next of column l / 4 of
// matrix i.
__device__ __forceinline__ void store_matrices_transposed(void* row, const uint32_t (&in)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3])
               : "memory");
}

// a * b, and a * b + c rounded once, of two elements in a register.
template <class T>
__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t multiply_pair<__half>(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
template <>
__device__ __forceinline__ uint32_t multiply_pair<__nv_bfloat16>(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
template <class T>
__device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c);
template <>
__device__ __forceinline__ uint32_t fma_pair<__half>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}
template <>
__device__ __forceinline__ uint32_t fma_pair<__nv_bfloat16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

__device__ __forceinline__ SharedOperand shared_operand(const void* tile) {
  return SharedOperand::at(shared_address(tile));
}

// Whole warpgroup. Before the first product, and between any other access to the registers of one
// and that product.
__device__ __forceinline__ void multiply_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Whole warpgroup. Closes a group of products; waits until at most `kPending` groups are under way.
__device__ __forceinline__ void multiply_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler, to which a product is done when it has been started, from moving other uses
// of its registers across this point.
template <int kCount>
__device__ __forceinline__ void settle(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void settle(uint32_t (&registers)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) asm volatile("" : "+r"(registers[i / 4][i % 4])::"memory");
}

#define PYLORA_D_0_63                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, " \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define PYLORA_D_64_127                                                                        \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, " \
  "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, " \
  "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PYLORA_D_8(i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define PYLORA_D_64(i)                                                                          \
  PYLORA_D_8(i), PYLORA_D_8(i + 8), PYLORA_D_8(i + 16), PYLORA_D_8(i + 24), PYLORA_D_8(i + 32), \
      PYLORA_D_8(i + 40), PYLORA_D_8(i + 48), PYLORA_D_8(i + 56)
#define PYLORA_A_B "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "r"(add)
#define PYLORA_WGMMA_128(types, transposed)                                                      \
  asm volatile(                                                                                  \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128" types \
      " {" PYLORA_D_0_63 "}, {%64, %65, %66, %67}, %68, add, 1, 1" transposed ";\n}"             \
      : PYLORA_D_64(0)                                                                           \
      : PYLORA_A_B)
#define PYLORA_WGMMA_256(types, transposed)                                                       \
  asm volatile(                                                                                   \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %133, 0;\nwgmma.mma_async.sync.aligned.m64n256" types \
      " {" PYLORA_D_0_63 ", " PYLORA_D_64_127                                                     \
      "}, {%128, %129, %130, %131}, %132, add, 1, 1" transposed ";\n}"                            \
      : PYLORA_D_64(0), PYLORA_D_64(64)                                                           \
      : PYLORA_A_B)

// Whole warpgroup. Starts d = A B, or d += A B where `add`, with A [64, 32 bytes] in registers,
// B [32 bytes, kTokens] of the same type and d in fp32; float stands for TF32, which leaves out the
// 13 lowest bits. With w the warp of the group, g = lane / 4 and t = lane % 4 a lane holds
//   16 bits  a[0] row 16 w + g, k = 2t, 2t + 1; a[1] row + 8; a[2] k + 8; a[3] both
//   float    a[0] row 16 w + g, k = t;          a[1] row + 8; a[2] k + 4; a[3] both
//   d[4 j], d[4 j + 1] row 16 w + g, columns 8 j + 2t and the next; d[4 j + 2], d[4 j + 3] row + 8
// Neither d nor a nor B may be touched until it has been waited for.
template <class T, int kTokens>
__device__ __forceinline__ void multiply(float (&d)[kTokens / 2], const uint32_t (&a)[4],
                                         SharedOperand b, int add) {
  constexpr bool kHalf = std::is_same_v<T, __half>, kFloat = std::is_same_v<T, float>;
  static_assert(kTokens == 128 || kTokens == 256);
  static_assert(kHalf || kFloat || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (kTokens == 128 && kHalf) PYLORA_WGMMA_128("k16.f32.f16.f16", ", 0");
  if constexpr (kTokens == 128 && kFloat) PYLORA_WGMMA_128("k8.f32.tf32.tf32", "");
  if constexpr (kTokens == 128 && !kHalf && !kFloat) PYLORA_WGMMA_128("k16.f32.bf16.bf16", ", 0");
  if constexpr (kTokens == 256 && kHalf) PYLORA_WGMMA_256("k16.f32.f16.f16", ", 0");
  if constexpr (kTokens == 256 && kFloat) PYLORA_WGMMA_256("k8.f32.tf32.tf32", "");
  if constexpr (kTokens == 256 && !kHalf && !kFloat) PYLORA_WGMMA_256("k16.f32.bf16.bf16", ", 0");
}

#undef PYLORA_D_0_63
#undef PYLORA_D_64_127
#undef PYLORA_D_8
#undef PYLORA_D_64
#undef PYLORA_A_B
#undef PYLORA_WGMMA_128
#undef PYLORA_WGMMA_256

}  // namespace pylora::cuda

#endif
