// The matrix product of gemm_tile.h in AMX tiles, which have 16 rows of 64 bytes.
//
// An A tile is 16 rows of the panel times 16 elements (pairs of bf16 along the sum), a B tile is 16
// elements times 16 tokens, and a C tile is 16 rows times 16 tokens in fp32. gemm_tile.h and
// gemm_pack.h use these layouts anyway, with one exception: the panel is row-major in the backward
// too. The sum runs over whole tiles, so panel and packed tokens are padded with zeros.
//
// `Tiles` stands for the eight tile registers: the processor's own, or a twin of them in AVX-512
// BF16. With the twin, everything except the AMX instructions is tested on machines without AMX.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/gemm_pack.h"
#include "cpu/gemm_tile.h"
#include "cpu/nf4_panel.h"
#include "cpu/vec_avx512_bf16.h"

namespace pylora::cpu {

inline constexpr int kAmxTileRows = 16;
inline constexpr int kAmxTileElements = 16;  // 64 bytes
inline constexpr int64_t kAmxPanel = 96;     // rows of a panel

#if defined(__AMX_BF16__)
struct HardwareTiles {
  // Configures all eight tiles at full size while it lives. They are released at the end, so that
  // the system need not save them at every context switch.
  struct Scope {
    Scope() {
      struct alignas(64) Config {
        uint8_t palette = 1;
        uint8_t start_row = 0;
        uint8_t reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      _tile_loadconfig(&config);
    }
    ~Scope() { _tile_release(); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
  };

  // This is assembly because the compiler's macros paste the tile's number as text, and so cannot
  // take a template argument.
  template <int kTile>
  PYLORA_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  PYLORA_INLINE void load(const float* from, int64_t ld) {
    const int64_t bytes = ld * static_cast<int64_t>(sizeof(float));
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(kTile) : "memory");
  }
  template <int kTile>
  PYLORA_INLINE void store(float* to, int64_t ld) {
    const int64_t bytes = ld * static_cast<int64_t>(sizeof(float));
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(kTile) : "memory");
  }
  template <int kC, int kA, int kB>
  PYLORA_INLINE void dot() {  // C += A B; the assembler wants B first
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
};
#endif

struct EmulatedTiles {
  struct Scope {};
  // They live on the stack of each product, uninitialized, as the registers are.
  alignas(64) float tiles[8][kAmxTileRows][kAmxTileElements];

  template <int kTile>
  void zero() {
    for (auto& row : tiles[kTile]) _mm512_store_ps(row, _mm512_setzero_ps());
  }
  template <int kTile>
  void load(const float* from, int64_t ld) {
    for (int i = 0; i < kAmxTileRows; ++i) {
      _mm512_store_ps(tiles[kTile][i], _mm512_loadu_ps(from + i * ld));
    }
  }
  template <int kTile>
  void store(float* to, int64_t ld) {
    for (int i = 0; i < kAmxTileRows; ++i) {
      _mm512_storeu_ps(to + i * ld, _mm512_load_ps(tiles[kTile][i]));
    }
  }
  template <int kC, int kA, int kB>
  void dot() {
    for (int i = 0; i < kAmxTileRows; ++i) {
      __m512 acc = _mm512_load_ps(tiles[kC][i]);
      for (int k = 0; k < kAmxTileElements; ++k) {
        acc = Avx512Bf16::dot(acc, _mm512_set1_ps(tiles[kA][i][k]), _mm512_load_ps(tiles[kB][k]));
      }
      _mm512_store_ps(tiles[kC][i], acc);
    }
  }
};

// The vector primitives beside AMX: two tiles lie side by side.
struct AmxVectors : Avx512Bf16 {
  static constexpr int kMaxV = 2;
};

template <class S, class Tiles>
struct AmxMac : Bf16Mac<S> {
  static constexpr int kGrain = kAmxTileElements;
  static constexpr bool kRowMajorOnly = true;
  static constexpr int64_t kForwardPanel = kAmxPanel;
  static constexpr int64_t kRowsUnit = 2 * kAmxTileRows;
  static constexpr int64_t kChain = 256;
  static constexpr bool kChainFirst = true;
  using Scope = typename Tiles::Scope;
  PYLORA_INLINE static constexpr int rows_for(int) { return kRowsUnit; }
};

// The products of gemm_tile.h in these tiles.
template <class Tiles>
struct Amx {
  template <class S>
  using Mac = AmxMac<S, Tiles>;
};

// c[32][kColumns tiles] (+)= a[32][k_count] b[k_count][kColumns tiles].
template <class Tiles, int kColumns>
__attribute__((noinline)) void amx_tile(int64_t k_count, const float* a, const float* b, float* c,
                                        int64_t ld, bool accumulate) {
  constexpr bool kTwo = kColumns == 2;
  float* below = c + kAmxTileRows * ld;
  Tiles t;
  if (accumulate) {
    t.template load<0>(c, ld);
    t.template load<2>(below, ld);
    if constexpr (kTwo) t.template load<1>(c + kAmxTileRows, ld);
    if constexpr (kTwo) t.template load<3>(below + kAmxTileRows, ld);
  } else {
    t.template zero<0>();
    t.template zero<2>();
    if constexpr (kTwo) t.template zero<1>();
    if constexpr (kTwo) t.template zero<3>();
  }
  for (int64_t k = 0; k < k_count; k += kAmxTileElements) {
    t.template load<4>(a + k, kTileLd);
    t.template load<6>(b + k * ld, ld);
    t.template dot<0, 4, 6>();
    if constexpr (kTwo) t.template load<7>(b + k * ld + kAmxTileRows, ld);
    if constexpr (kTwo) t.template dot<1, 4, 7>();
    t.template load<5>(a + kAmxTileRows * kTileLd + k, kTileLd);
    t.template dot<2, 5, 6>();
    if constexpr (kTwo) t.template dot<3, 5, 7>();
  }
  t.template store<0>(c, ld);
  t.template store<2>(below, ld);
  if constexpr (kTwo) t.template store<1>(c + kAmxTileRows, ld);
  if constexpr (kTwo) t.template store<3>(below + kAmxTileRows, ld);
}

template <Broadcast kOrder, class S, class Tiles>
inline void run_tile(AmxMac<S, Tiles>, int v, int64_t k_count, const float* a, int64_t,
                     const float* b, float* c, bool accumulate) {
  static_assert(kOrder == Broadcast::kRowMajor && S::kLanes == kAmxTileRows);
  const int64_t ld = v * S::kLanes;
  int j = 0;
  for (; j + 2 <= v; j += 2) {
    amx_tile<Tiles, 2>(k_count, a, b + j * kAmxTileRows, c + j * kAmxTileRows, ld, accumulate);
  }
  if (j < v)
    amx_tile<Tiles, 1>(k_count, a, b + j * kAmxTileRows, c + j * kAmxTileRows, ld, accumulate);
}

// Fills a row with zeros from the end of its `count` values to the end of its last tile.
PYLORA_INLINE void pad_row(int64_t count, float* row) {
  for (int64_t i = (count + 1) / 2; i % kAmxTileElements != 0; ++i) row[i] = 0.0f;
}

template <class S, class Tiles>
void decode_panel(AmxMac<S, Tiles>, const NF4Matrix& w, int64_t row, int64_t rows, int64_t col,
                  int64_t count, int64_t ahead, float* panel) {
  for (int64_t i = 0; i < rows; ++i) {
    decode_row_bf16<S>(w, row + i, col, count, ahead, panel + i * kTileLd);
    pad_row(count, panel + i * kTileLd);
  }
}

// Sets 16 elements of each row of the row-major panel, from element e on, to the columns of
// `filled` rows of pairs that are `ld` apart, and to zeros.
template <class S>
PYLORA_INLINE void transpose_pairs(const float* pairs, int64_t ld, int64_t filled, int64_t cols,
                                   int64_t e, float* panel) {
  for (int64_t j = 0; j < cols; j += S::kLanes) {
    typename S::F square[S::kLanes];
    for (int k = 0; k < S::kLanes; ++k) {
      square[k] = k < filled ? S::load(pairs + k * ld + j) : S::zero();
    }
    S::transpose(square);
    for (int k = 0; k < S::kLanes; ++k) S::store(panel + (j + k) * kTileLd + e, square[k]);
  }
}

// Fills the row-major panel with pairs of rows, 16 pairs at a time: pairs_of(first, rows, out) puts
// them to out [pairs][ld].
template <class S, class PairsOf>
PYLORA_INLINE void fill_panel_t(int64_t count, int64_t cols, float* panel, int64_t ld,
                                const PairsOf& pairs_of) {
  constexpr int64_t kRows = 2 * kAmxTileElements;
  float pairs[kAmxTileElements * kAmxPanel];
  for (int64_t i = 0; i < count; i += kRows) {
    const int64_t rows = count - i < kRows ? count - i : kRows;
    pairs_of(i, rows, pairs);
    transpose_pairs<S>(pairs, ld, ceil_div(rows, 2), cols, i / 2, panel);
  }
}

template <class S, class Tiles>
void decode_panel_t(AmxMac<S, Tiles>, const NF4Matrix& w, int64_t row, int64_t count, int64_t col,
                    int64_t cols, float* panel, int64_t ld) {
  fill_panel_t<S>(count, cols, panel, ld, [&](int64_t first, int64_t rows, float* pairs) {
    decode_panel_t(Bf16Mac<S>{}, w, row + first, rows, col, cols, pairs, ld);
  });
}

template <class S, class Tiles>
void copy_panel_t(AmxMac<S, Tiles>, const BFloat16* x, int64_t ld, int64_t count, int64_t cols,
                  float* panel, int64_t panel_ld) {
  fill_panel_t<S>(count, cols, panel, panel_ld, [&](int64_t first, int64_t rows, float* pairs) {
    const int v = static_cast<int>(panel_ld / S::kLanes);
    pack_rows<S, Bf16Mac>(x + first * ld, ld, rows, cols, v, pairs);
  });
}

}  // namespace pylora::cpu
