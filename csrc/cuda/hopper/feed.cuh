// What a CTA of nf4_linear_hopper.cu works on, and what brings it to shared memory.
#pragma once

#include "cuda/hopper/lora_linear.cuh"
#include "cuda/hopper/maps.cuh"
#include "cuda/hopper/ptx.cuh"

namespace pylora::cuda {

struct HopperProblem {
  TensorMap x_map, packed_map, low_map;
  LoraLinearHopper op;
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

// A tile of y and a slice of K.
struct Item {
  int64_t tile, first_row, first_token;
  int slice, first_block, end_block;
  bool has_low;  // the last slice has LoRA's product

  template <int kTokens>
  static __device__ __forceinline__ Item of(const HopperProblem& problem, int64_t number) {
    const HopperPlan& plan = problem.plan;
    const int blocks = static_cast<int>(problem.op.weight.cols / kHopperColumns);
    Item item;
    item.slice = static_cast<int>(number / plan.tiles);
    item.tile = number - item.slice * plan.tiles;
    item.first_row = item.tile % plan.row_tiles * kTileRows;
    item.first_token = item.tile / plan.row_tiles * kTokens;
    item.first_block = item.slice * plan.slice_blocks;
    item.end_block = min(item.first_block + plan.slice_blocks, blocks);
    item.has_low = problem.op.hidden.rank > 0 && item.slice == plan.slices - 1;
    return item;
  }
};

// 2.
template <int kTokens>
__device__ __forceinline__ void feed(const HopperProblem& problem, const Ring& ring) {
  using Stages = HopperStages<kTokens>;
  const int64_t items = problem.plan.tiles * problem.plan.slices;
  bool low_is_there = false;
  RingPlace place;
  prefetch_map(problem.x_map);
  prefetch_map(problem.packed_map);
  for (int64_t number = blockIdx.x; number < items; number += gridDim.x) {
    const Item item = Item::of<kTokens>(problem, number);
    const int row = static_cast<int>(item.first_row), token = static_cast<int>(item.first_token);
#pragma unroll 1
    for (int block = item.first_block; block < item.end_block; ++block) {
      uint8_t* stage = ring.stages + place.stage * Stages::kBytes;
      Barrier* full = ring.full + place.stage;
      barrier_wait(ring.empty + place.stage, place.parity ^ 1);
      barrier_arrive_expect(full, Stages::kBytes);
      copy_tile(stage, problem.x_map, token, block * static_cast<int>(kHopperColumns), full);
      copy_tile(stage + Stages::kXBytes, problem.packed_map, row, block * kPackedRowBytes, full);
      place.advance(Stages::kCount);
    }
    if (!item.has_low) continue;
    if (!low_is_there) wait_for_previous_kernel();
    low_is_there = true;
#pragma unroll 1
    for (int first = 0; first < problem.op.hidden.rank; first += kLowColumns) {
      Barrier* full = ring.full + place.stage;
      barrier_wait(ring.empty + place.stage, place.parity ^ 1);
      barrier_arrive_expect(full, Stages::kXBytes);
      copy_tile(ring.stages + place.stage * Stages::kBytes, problem.low_map, token, first, full);
      place.advance(Stages::kCount);
    }
  }
}

#endif

}  // namespace pylora::cuda
