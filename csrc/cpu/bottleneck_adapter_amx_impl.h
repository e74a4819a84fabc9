// The tile of a bottleneck adapter's second product (bottleneck_adapter_tile.h) in AMX tiles.
#pragma once

#include "cpu/amx_tile.h"
#include "cpu/bottleneck_adapter_impl.h"

namespace pylora::cpu {

template <int V, class S, class Tiles, class T>
void expand_tile(AmxMac<S, Tiles> mac, int64_t depth, const float* factors, const float* panel,
                 const float* bias, const T* add, T* out, int64_t ld, int64_t rows, int64_t cols) {
  constexpr int L = S::kLanes;
  constexpr int64_t kWidth = V * L;
  constexpr int kRows = AmxMac<S, Tiles>::rows_for(V);
  alignas(64) float sums[kRows * kWidth];
  for (int64_t start = 0; start < depth; start += kAdapterChain, factors += kSegmentFloats) {
    const int64_t count = depth - start < kAdapterChain ? depth - start : kAdapterChain;
    run_tile<Broadcast::kRowMajor>(mac, V, count, factors, 0, panel + start * kWidth, sums,
                                   start > 0);
  }
  for (int64_t i = 0; i < kRows && i < rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if (cols <= v * L) break;
      const int n = static_cast<int>(cols - v * L < L ? cols - v * L : L);
      const int64_t place = i * ld + v * L;
      typename S::F sum = S::load(sums + i * kWidth + v * L);
      if (bias != nullptr) sum = S::add(sum, S::load_n(bias + v * L, n));
      if (add != nullptr) sum = S::add(sum, S::load_n(add + place, n));
      S::store_n(out + place, sum, n);
    }
  }
}

}  // namespace pylora::cpu
