// PTX wrappers for bulk copies of consecutive bytes, to one CTA or to all CTAs of a cluster, and
// for barriers of other CTAs. They are not in hopper/ptx.cuh, since the kernels of pylora copy
// tiles and have no clusters.
#pragma once

#include "cuda/hopper/ptx.cuh"

namespace pylora::cuda {}

#if PYLORA_SM90A

namespace primitives {

using namespace pylora;
using namespace pylora::cuda;

// Called by one thread. Copies `bytes`, a multiple of 16, to `shared`. `barrier` counts them.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes,
                                          Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// Called by one thread. Copies `bytes` to the same place in every CTA of the cluster whose bit is
// set in `ctas`. Each of these CTAs counts the bytes at its own barrier.
__device__ __forceinline__ void copy_bulk_to(void* shared, const void* global, int bytes,
                                             Barrier* barrier, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "h"(ctas)
      : "memory");
}

// Arrives at the barrier of CTA `cta` that has the same place there as `barrier` has in this CTA.
// It does not make visible what this thread wrote, which would take a fence of the whole GPU. It
// only says that copies may overwrite a place.
__device__ __forceinline__ void barrier_arrive_at(Barrier* barrier, uint32_t cta) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(cta)
      : "memory");
}
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Called by all threads of all CTAs of the cluster.
__device__ __forceinline__ void cluster_barrier() {
  __syncwarp();  // the threads of the warp may have diverged
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

}  // namespace primitives

#endif
