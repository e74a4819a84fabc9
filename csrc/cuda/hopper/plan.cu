#include <algorithm>

#include "cuda/hopper/maps.cuh"
#include "cuda/hopper/plan.cuh"
#include "cuda/limits.h"

namespace pylora::cuda {
namespace {

// The plan with so many splits, or as many of them as are not empty; all of it but the grid.
HopperPlan cut(int tile_tokens, int64_t splits, int64_t tokens, int64_t rows, int64_t cols) {
  HopperPlan plan;
  plan.tile_tokens = tile_tokens;
  plan.row_tiles = ceil_div(rows, kTileRows);
  plan.tiles = plan.row_tiles * ceil_div(tokens, tile_tokens);
  const int64_t k_tiles = cols / kHopperColumns;
  plan.split_k_tiles = static_cast<int>(ceil_div(k_tiles, splits));
  plan.splits = static_cast<int>(ceil_div(k_tiles, plan.split_k_tiles));
  return plan;
}

}  // namespace

HopperPlan plan_hopper(int64_t tokens, int64_t rows, int64_t cols, int processors) {
  // What a k_tile costs in a tile of 128 and of 256 tokens, where shared memory and the tensor cores
  // are the limit; and in k_tiles, what a tile costs beside them, and what splits of K add to that.
  constexpr int64_t kKTileCosts[] = {6, 10}, kOutputTileKTiles = 8, kSplitKTiles = 8;
  constexpr int64_t kLeastKTiles = 8;  // of a split
  HopperPlan best;
  int64_t least_cost = 0;
  for (const int tile_tokens : {128, 256}) {
    const int64_t finest = std::max<int64_t>(cols / kHopperColumns / kLeastKTiles, 1);
    const int64_t tiles = cut(tile_tokens, 1, tokens, rows, cols).tiles;
    const int64_t splits = std::clamp<int64_t>(processors / tiles, 1, finest);
    HopperPlan plan = cut(tile_tokens, splits, tokens, rows, cols);
    const int64_t items = plan.tiles * plan.splits;
    plan.grid = static_cast<int>(std::min<int64_t>(items, processors));
    const int64_t beside = kOutputTileKTiles + (plan.splits > 1 ? kSplitKTiles : 0);
    const int64_t cost = ceil_div(items, processors) * (plan.split_k_tiles + beside) *
                         kKTileCosts[tile_tokens == 256];
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
  if (choice.splits < 1 || choice.splits > cols / kHopperColumns) {
    return "slices must be 1 to the k_tiles of 64 columns";
  }
  *plan = cut(static_cast<int>(choice.tile_tokens), choice.splits, tokens, rows, cols);
  if (plan->splits != choice.splits) {
    return "slices must not leave one empty: all but the last have the same number of k_tiles";
  }
  if (choice.grid < 1 || choice.grid > std::min<int64_t>(plan->tiles * plan->splits, INT32_MAX)) {
    return "grid must be 1 to the tiles times splits";
  }
  plan->grid = static_cast<int>(choice.grid);
  return nullptr;
}

int64_t HopperPlan::partial_floats() const {
  return splits > 1 ? splits * tiles * kTileRows * tile_tokens : 0;
}

int64_t HopperPlan::counters() const { return splits > 1 ? tiles * kConsumers : 0; }

}  // namespace pylora::cuda
