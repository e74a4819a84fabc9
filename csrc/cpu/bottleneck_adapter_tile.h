// The panels of a weight of a bottleneck adapter (bottleneck_adapter.h), and the tile of its second
// product, as templates over the vector primitives and over the products of gemm_tile.h.
#pragma once

#include "cpu/bottleneck_adapter.h"
#include "cpu/gemm_pack.h"
#include "cpu/parallel.h"

namespace pylora::cpu {

// The tokens of a block. Panels of a weight are read once for all of them.
inline constexpr int64_t kAdapterTokens = 96;
// A stretch of x is fetched so many tokens ahead. Tokens may lie a power of two apart, and then more
// of them would not fit their sets of the second-level cache.
inline constexpr int64_t kTokensAhead = 4;
// Sums run in chains of so many elements of gemm_tile.h, which are then added. A panel of that depth
// takes 64 KiB with 64 columns of AVX-512, 32 KiB in AMX tiles and 16 KiB at most elsewhere. It is
// read in order, once for each tile of tokens, and comes from the second-level cache if it is larger
// than the first.
inline constexpr int64_t kAdapterChain = 256;
// Panels of so many floats together stay in the second-level cache.
inline constexpr int64_t kStripFloats = 32 * 1024;
// The bottleneck features that the second product broadcasts lie in segments of a chain's length.
inline constexpr int64_t kSegments = kMaxBottleneck / kAdapterChain;
inline constexpr int64_t kSegmentFloats = kAdapterTokens * kTileLd;

// A weight as panels of up to TokenTiles<S>::kWidth columns: [stretches of k][columns / kWidth]
// [elements of k in the stretch][columns in the panel].
template <class S, template <class> class Mac>
struct Panels {
  TokenTiles<S> tiles;
  int64_t depth;    // the length of k
  int64_t stretch;  // of all stretches of k but the last
  float* values;

  int64_t count(int64_t k) const { return depth - k < stretch ? depth - k : stretch; }
  int64_t elements(int64_t k) const { return elements_of<Mac<S>>(count(k)); }
  // The panel of tile t in the stretch that begins at k.
  float* panel(int64_t k, int64_t t) const {
    return values + k / Mac<S>::kStep * tiles.padded() + tiles.offset(t, elements(k));
  }
};

// Packs the matrix of a product over k < depth to `memory`, which must have packed_floats(). Its
// element (k, n) is weight[n * depth + k] if `transposed`, else weight[k * columns + n].
template <class S, template <class> class Mac, class T>
Panels<S, Mac> pack_weight(const T* weight, int64_t depth, int64_t columns, bool transposed,
                           int64_t stretch, float* memory) {
  constexpr int64_t kWide = TokenTiles<S>::kWidth;
  const TokenTiles<S> tiles{columns};
  const Panels<S, Mac> out{tiles, depth, stretch, memory};
  const int64_t panels = ceil_div(depth, stretch) * tiles.count();
  parallel_for(0, panels, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / tiles.count() * stretch;
      const int64_t t = i % tiles.count();
      const int v = tiles.vectors(t);
      const int64_t cols = tiles.tokens_in(t);
      float* to = out.panel(first, t);
      if (transposed) {
        const T* from = weight + t * kWide * depth + first;
        pack_tile<S, Mac>(from, depth, cols, out.count(first), v, to);
      } else {
        const T* from = weight + first * columns + t * kWide;
        pack_rows<S, Mac>(from, columns, out.count(first), cols, v, to);
      }
    }
  });
  return out;
}

// The floats that a weight of this call takes at most, packed along either side.
template <class S>
int64_t packed_floats(const BottleneckArgs& args) {
  return round_up(args.size, S::kLanes) * round_up(args.hidden, S::kLanes);
}

// Starts to load `count` values from p on, which are needed soon.
template <class T>
PYLORA_INLINE void prefetch_row(const T* p, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(p + i, 0, 2);
}

// Computes `rows` rows of a tile of out = factors @ panel + bias + add, where `bias` and `add` may be
// null. The sum has `depth` elements. `factors` has rows of kTileLd elements, in segments that are
// kSegmentFloats apart; `add` and `out` have rows of `ld` values, of which the tile covers `cols`.
template <int V, class S, template <class> class Mac, class T>
__attribute__((noinline)) void expand_tile(Mac<S>, int64_t depth, const float* factors,
                                           const float* panel, const float* bias, const T* add,
                                           T* out, int64_t ld, int64_t rows, int64_t cols) {
  using F = typename S::F;
  constexpr int I = S::rows_for(V);
  constexpr int L = S::kLanes;
  for (int64_t i = 0; i < I && i < rows; ++i) {
    if (add != nullptr) __builtin_prefetch(add + i * ld, 0, 3);
    __builtin_prefetch(out + i * ld, 1, 3);
  }
  F acc[I][V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const int64_t left = cols - v * L;
    const F first = bias == nullptr || left <= 0 ? S::zero()
                    : left >= L                  ? S::load(bias + v * L)
                                                 : S::load_n(bias + v * L, static_cast<int>(left));
#pragma GCC unroll 32
    for (int i = 0; i < I; ++i) acc[i][v] = first;
  }
  float finished[I * V * L];  // the sum of all chains but the last
  for (int64_t start = 0; start < depth; start += kAdapterChain, factors += kSegmentFloats) {
    if (start > 0) {
#pragma GCC unroll 32
      for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          float* sum = finished + (i * V + v) * L;
          S::store(sum, start > kAdapterChain ? S::add(acc[i][v], S::load(sum)) : acc[i][v]);
          acc[i][v] = S::zero();
        }
      }
    }
    const int64_t count = depth - start < kAdapterChain ? depth - start : kAdapterChain;
    for (int64_t k = 0; k < count; ++k, panel += V * L) {
      F bv[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) bv[v] = S::load(panel + v * L);
#pragma GCC unroll 32
      for (int i = 0; i < I; ++i) {
        const F av = S::set1(factors[i * kTileLd + k]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[i][v] = Mac<S>::mac(acc[i][v], av, bv[v]);
      }
    }
  }
  if (depth > kAdapterChain) {
#pragma GCC unroll 32
    for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        acc[i][v] = S::add(acc[i][v], S::load(finished + (i * V + v) * L));
      }
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < I; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t place = i * ld + v * L;
      if (cols - v * L >= L) {
        S::store(out + place, add == nullptr ? acc[i][v] : S::add(acc[i][v], S::load(add + place)));
      } else if (cols > v * L) {
        const int n = static_cast<int>(cols - v * L);
        S::store_n(out + place,
                   add == nullptr ? acc[i][v] : S::add(acc[i][v], S::load_n(add + place, n)), n);
      }
    }
  }
}

}  // namespace pylora::cpu
