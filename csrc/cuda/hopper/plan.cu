#include <algorithm>

#include "cuda/hopper/lora_linear.cuh"
#include "cuda/hopper/maps.cuh"

namespace pylora::cuda {
namespace {

// The plan with so many slices, or as many of them as are not empty; all of it but the grid.
HopperPlan cut(int tile_tokens, int64_t slices, int64_t tokens, int64_t rows, int64_t cols) {
  HopperPlan plan;
  plan.tile_tokens = tile_tokens;
  plan.row_tiles = ceil_div(rows, kTileRows);
  plan.tiles = plan.row_tiles * ceil_div(tokens, tile_tokens);
  const int64_t blocks = cols / kHopperColumns;
  plan.slice_blocks = static_cast<int>(ceil_div(blocks, slices));
  plan.slices = static_cast<int>(ceil_div(blocks, plan.slice_blocks));
  return plan;
}

}  // namespace

HopperPlan plan_hopper(int64_t tokens, int64_t rows, int64_t cols, int processors) {
  // What a block costs in a tile of 128 and of 256 tokens, where shared memory and the tensor cores
  // are the limit; and in blocks, what a tile costs beside them, and what slices of K add to that.
  constexpr int64_t kBlockCosts[] = {6, 10}, kTileBlocks = 8, kSliceBlocks = 8;
  constexpr int64_t kLeastBlocks = 8;  // of a slice
  HopperPlan best;
  int64_t least_cost = 0;
  for (const int tile_tokens : {128, 256}) {
    const int64_t finest = std::max<int64_t>(cols / kHopperColumns / kLeastBlocks, 1);
    const int64_t tiles = cut(tile_tokens, 1, tokens, rows, cols).tiles;
    const int64_t slices = std::clamp<int64_t>(processors / tiles, 1, finest);
    HopperPlan plan = cut(tile_tokens, slices, tokens, rows, cols);
    const int64_t items = plan.tiles * plan.slices;
    plan.grid = static_cast<int>(std::min<int64_t>(items, processors));
    const int64_t beside = kTileBlocks + (plan.slices > 1 ? kSliceBlocks : 0);
    const int64_t cost = ceil_div(items, processors) * (plan.slice_blocks + beside) *
                         kBlockCosts[tile_tokens == 256];
    if (least_cost == 0 || cost < least_cost) {
      least_cost = cost;
      best = plan;
    }
  }
  return best;
}

const char* choose_hopper(const HopperChoice& choice, int64_t tokens, int64_t rows, int64_t cols,
                          HopperPlan* plan) {
  if (choice.tile_tokens != 128 && choice.tile_tokens != 256) {
    return "tile_tokens must be 128 or 256";
  }
  if (choice.slices < 1 || choice.slices > cols / kHopperColumns) {
    return "slices must be 1 to the blocks of 64 columns";
  }
  *plan = cut(static_cast<int>(choice.tile_tokens), choice.slices, tokens, rows, cols);
  if (plan->slices != choice.slices) {
    return "slices must not leave one empty: all but the last have the same number of blocks";
  }
  if (choice.grid < 1 || choice.grid > std::min<int64_t>(plan->tiles * plan->slices, INT32_MAX)) {
    return "grid must be 1 to the tiles times slices";
  }
  plan->grid = static_cast<int>(choice.grid);
  return nullptr;
}

int64_t HopperPlan::partial_floats() const {
  return slices > 1 ? slices * tiles * kTileRows * tile_tokens : 0;
}

int64_t HopperPlan::counters() const { return slices > 1 ? tiles * kConsumers : 0; }

}  // namespace pylora::cuda
