// What a CTA of lora_linear_hopper.cu works on, and what brings it to shared memory.
#pragma once

#include "cuda/hopper/lora_linear.cuh"
#include "cuda/hopper/maps.cuh"
#include "cuda/hopper/ptx.cuh"
#include "cuda/limits.h"

namespace pylora::cuda {

struct LoraLinearHopperParams {
  TensorMap x_map, packed_map, low_map;
  LoraLinearHopperArgs args;
  HopperPlan plan;
  int block_shift;         // log2 of blocksize / 64
  int nested_block_shift;  // log2 of nested_blocksize
};

#if PYLORA_SM90A

// What the CTA has in shared memory beside the decode table.
struct Ring {
  uint8_t* stages;
  Barrier* full;   // a stage's copies have come
  Barrier* empty;  // the consumers have left it
  int* is_last;    // [kConsumers] in 5.
};

// A tile of y and a split of K.
struct WorkItem {
  int64_t tile, first_row, first_token;
  int split, first_k_tile, end_k_tile;
  bool has_low;  // the last split has LoRA's product

  template <int kTokens>
  static __device__ __forceinline__ WorkItem make(const LoraLinearHopperParams& params,
                                                  int64_t number) {
    const HopperPlan& plan = params.plan;
    const int k_tiles = static_cast<int>(params.args.weight.cols / kHopperColumns);
    WorkItem item;
    item.split = static_cast<int>(number / plan.tiles);
    item.tile = number - item.split * plan.tiles;
    item.first_row = item.tile % plan.row_tiles * kTileRows;
    item.first_token = item.tile / plan.row_tiles * kTokens;
    item.first_k_tile = item.split * plan.split_k_tiles;
    item.end_k_tile = min(item.first_k_tile + plan.split_k_tiles, k_tiles);
    item.has_low = params.args.shrink.rank > 0 && item.split == plan.splits - 1;
    return item;
  }
};

// 2.
template <int kTokens>
__device__ __forceinline__ void produce(const LoraLinearHopperParams& params, const Ring& ring) {
  using Stages = HopperStages<kTokens>;
  const int64_t items = params.plan.tiles * params.plan.splits;
  bool low_is_there = false;
  RingPlace place;
  prefetch_map(params.x_map);
  prefetch_map(params.packed_map);
  for (int64_t number = blockIdx.x; number < items; number += gridDim.x) {
    const WorkItem item = WorkItem::make<kTokens>(params, number);
    const int row = static_cast<int>(item.first_row), token = static_cast<int>(item.first_token);
#pragma unroll 1
    for (int k_tile = item.first_k_tile; k_tile < item.end_k_tile; ++k_tile) {
      uint8_t* stage = ring.stages + place.stage * Stages::kBytes;
      Barrier* full = ring.full + place.stage;
      barrier_wait(ring.empty + place.stage, place.parity ^ 1);
      barrier_arrive_expect(full, Stages::kBytes);
      copy_tile(stage, params.x_map, token, k_tile * static_cast<int>(kHopperColumns), full);
      copy_tile(stage + Stages::kXBytes, params.packed_map, row, k_tile * kPackedRowBytes, full);
      place.advance(Stages::kCount);
    }
    if (!item.has_low) continue;
    if (!low_is_there) wait_for_previous_kernel();
    low_is_there = true;
#pragma unroll 1
    for (int first = 0; first < params.args.shrink.rank; first += kLowColumns) {
      Barrier* full = ring.full + place.stage;
      barrier_wait(ring.empty + place.stage, place.parity ^ 1);
      barrier_arrive_expect(full, Stages::kXBytes);
      copy_tile(ring.stages + place.stage * Stages::kBytes, params.low_map, token, first, full);
      place.advance(Stages::kCount);
    }
  }
}

#endif

}  // namespace pylora::cuda
