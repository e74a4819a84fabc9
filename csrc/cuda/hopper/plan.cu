#include <algorithm>

#include "cuda/hopper/maps.cuh"
#include "cuda/hopper/plan.cuh"
#include "cuda/limits.h"

namespace pylora::cuda {
namespace {

// The plan with `splits` splits, or fewer if some would be empty. It still lacks the grid.
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
  // The cost of a K tile in an output tile of 128 and of 256 tokens. Beside its K tiles an output
  // tile costs as much as kOutputTileCost of them, and kSplitCost more if K is split.
  constexpr int64_t kKTileCosts[] = {6, 10}, kOutputTileCost = 8, kSplitCost = 8;
  constexpr int64_t kLeastKTiles = 8;  // a split has no fewer
  HopperPlan best;
  int64_t least_cost = 0;
  for (const int tile_tokens : {128, 256}) {
    const int64_t finest = std::max<int64_t>(cols / kHopperColumns / kLeastKTiles, 1);
    const int64_t tiles = cut(tile_tokens, 1, tokens, rows, cols).tiles;
    const int64_t splits = std::clamp<int64_t>(processors / tiles, 1, finest);
    HopperPlan plan = cut(tile_tokens, splits, tokens, rows, cols);
    const int64_t items = plan.tiles * plan.splits;
    plan.grid = static_cast<int>(std::min<int64_t>(items, processors));
    const int64_t beside = kOutputTileCost + (plan.splits > 1 ? kSplitCost : 0);
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
    return "splits must be 1 to the K tiles of 64 columns";
  }
  *plan = cut(static_cast<int>(choice.tile_tokens), choice.splits, tokens, rows, cols);
  if (plan->splits != choice.splits) {
    return "splits must not leave one empty: all but the last have the same number of K tiles";
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
