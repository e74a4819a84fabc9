// Packs the token operand of gemm_tile.h, and writes its accumulators back.
//
// A batch of tokens is cut into tiles of V * S::kLanes tokens, V <= S::kMaxV. A packed tile is
// [elements along k][tokens]; a tile of accumulators is [outputs][tokens]. The tensors are
// row-major, so both are transposed on the way, in registers, and change their dtype there.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/float16.h"
#include "cpu/gemm_tile.h"

namespace pylora::cpu {

PYLORA_INLINE int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

// A batch of tokens, cut into tiles. All tiles but the last have kWidth tokens.
template <class S>
struct TokenTiles {
  static constexpr int64_t kWidth = S::kMaxV * S::kLanes;
  int64_t tokens;

  PYLORA_INLINE int64_t count() const { return ceil_div(tokens, kWidth); }
  PYLORA_INLINE int64_t tokens_in(int64_t t) const {
    return tokens - t * kWidth < kWidth ? tokens - t * kWidth : kWidth;
  }
  PYLORA_INLINE int vectors(int64_t t) const {
    return static_cast<int>(ceil_div(tokens_in(t), S::kLanes));
  }
  PYLORA_INLINE int64_t padded() const { return round_up(tokens, S::kLanes); }
  // The offset of tile t in a buffer that has `depth` values for each token.
  PYLORA_INLINE int64_t offset(int64_t t, int64_t depth) const { return t * kWidth * depth; }
};

// Loads up to kLanes elements of a row from `p` on; the row has `n` values left.
template <class S, class T>
PYLORA_INLINE typename S::F load_elements(F32Mac<S>, const T* p, int64_t n) {
  return n >= S::kLanes ? S::load(p) : S::load_n(p, static_cast<int>(n));
}
template <class S>
PYLORA_INLINE typename S::F load_elements(Bf16Mac<S>, const BFloat16* p, int64_t n) {
  if (n >= 2 * S::kLanes) return S::load(reinterpret_cast<const float*>(p));
  float padded[S::kLanes] = {};
  std::memcpy(padded, p, static_cast<size_t>(n) * sizeof(BFloat16));
  return S::load(padded);
}
// Values of fp32 are rounded to bf16.
template <class S>
PYLORA_INLINE typename S::F load_elements(Bf16Mac<S>, const float* p, int64_t n) {
  float pairs[S::kLanes] = {};
  auto* narrow = reinterpret_cast<BFloat16*>(pairs);
  for (int64_t i = 0; i < 2 * S::kLanes && i < n; i += S::kLanes) {
    const int count = static_cast<int>(n - i < S::kLanes ? n - i : S::kLanes);
    S::store_n(narrow + i, S::load_n(p + i, count), count);
  }
  return S::load(pairs);
}

// Converts `count` values of a row to fp32.
template <class S, class T>
PYLORA_INLINE void widen_row(const T* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) S::store(out + i, S::load(x + i));
  for (; i < count; ++i) out[i] = to_float(x[i]);
}

// Writes `count` values of a row as elements, with zeros from there to the end of the last grain.
template <class S, template <class> class Mac, class T>
PYLORA_INLINE void copy_row(const T* x, int64_t count, float* out) {
  if constexpr (Mac<S>::kStep == 1) {
    widen_row<S>(x, count, out);
  } else {
    static_assert(std::is_same_v<T, BFloat16>);
    auto* values = reinterpret_cast<BFloat16*>(out);
    std::memcpy(values, x, static_cast<size_t>(count) * sizeof(BFloat16));
    const int64_t end = elements_of<Mac<S>>(count) * Mac<S>::kStep;
    for (int64_t i = count; i < end; ++i) values[i] = BFloat16{};
  }
}

// The same for fp32, which is rounded to bf16.
template <class S, template <class> class Mac>
PYLORA_INLINE void narrow_row(const float* x, int64_t count, float* out) {
  static_assert(Mac<S>::kStep == 2);
  auto* values = reinterpret_cast<BFloat16*>(out);
  for (int64_t i = 0; i < count; i += S::kLanes) {
    const int n = static_cast<int>(count - i < S::kLanes ? count - i : S::kLanes);
    S::store_n(values + i, S::load_n(x + i, n), n);
  }
  const int64_t end = elements_of<Mac<S>>(count) * Mac<S>::kStep;
  for (int64_t i = count; i < end; ++i) values[i] = BFloat16{};
}

// Packs `count` rows of x, whose columns already lie along the vectors: `cols` of them, from x on,
// into [elements][v * kLanes]. Zeros follow the last column and the last row.
template <class S, template <class> class Mac, class T>
void pack_rows(const T* x, int64_t ld, int64_t count, int64_t cols, int v, float* packed) {
  const int64_t width = v * S::kLanes;
  for (int64_t e = 0; e < elements_of<Mac<S>>(count); ++e, packed += width) {
    if constexpr (Mac<S>::kStep == 1) {
      widen_row<S>(x + e * ld, cols, packed);
      for (int64_t j = cols; j < width; ++j) packed[j] = 0.0f;
    } else {
      const T* row = x + 2 * e * ld;
      for (int64_t j = 0; j < width; j += S::kLanes) {
        const int64_t left = cols > j ? cols - j : 0;
        const int n = static_cast<int>(left < S::kLanes ? left : S::kLanes);
        S::store(packed + j,
                 2 * e >= count
                     ? S::zero()
                     : S::load_pairs(row + j, 2 * e + 1 < count ? row + ld + j : nullptr, n));
      }
    }
  }
}

// Copies columns [0, cols) of `count` rows of x, whose columns are outputs, into the panel of the
// backward: [elements][panel_ld], or row-major if the product wants it so (amx_tile.h).
template <class S, class T>
void copy_panel_t(F32Mac<S>, const T* x, int64_t ld, int64_t count, int64_t cols, float* panel,
                  int64_t panel_ld) {
  for (int64_t i = 0; i < count; ++i) widen_row<S>(x + i * ld, cols, panel + i * panel_ld);
}
template <class S>
void copy_panel_t(Bf16Mac<S>, const BFloat16* x, int64_t ld, int64_t count, int64_t cols,
                  float* panel, int64_t panel_ld) {
  const int v = static_cast<int>(panel_ld / S::kLanes);
  pack_rows<S, Bf16Mac>(x, ld, count, cols, v, panel);
}

// Packs one tile: `count` values along k of tokens [0, tokens) of x, whose rows are `ld` apart, into
// [elements][v * kLanes]. Zeros follow the last token and the last value.
template <class S, template <class> class Mac, class T>
void pack_tile(const T* x, int64_t ld, int64_t tokens, int64_t count, int v, float* packed) {
  constexpr int L = S::kLanes;
  constexpr int64_t kValues = L * Mac<S>::kStep;
  const int64_t width = v * L;
  const int64_t elements = elements_of<Mac<S>>(count);
  for (int64_t m = 0; m < width; m += L) {
    for (int64_t k = 0; k < count; k += kValues) {
      typename S::F square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        square[i] =
            m + i < tokens ? load_elements(Mac<S>{}, x + (m + i) * ld + k, count - k) : S::zero();
        __builtin_prefetch(x + (m + i) * ld + k + 8 * kValues, 0, 2);
      }
      S::transpose(square);
      const int64_t first = k / Mac<S>::kStep;
      float* out = packed + first * width + m;
      if (elements - first >= L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) S::store(out + i * width, square[i]);
      } else {
        for (int i = 0; i < static_cast<int>(elements - first); ++i) {
          S::store(out + i * width, square[i]);
        }
      }
    }
  }
}

// Packs all tiles of a batch of tokens; x points to the first value of the first token.
template <class S, template <class> class Mac, class T>
void pack_tokens(const T* x, int64_t ld, const TokenTiles<S>& tiles, int64_t count, float* packed) {
  const int64_t elements = elements_of<Mac<S>>(count);
  for (int64_t t = 0; t < tiles.count(); ++t) {
    pack_tile<S, Mac>(x + t * tiles.kWidth * ld, ld, tiles.tokens_in(t), count, tiles.vectors(t),
                      packed + tiles.offset(t, elements));
  }
}

// Writes one tile: y[m][n] = acc[n][m] + bias[n] + extra[n][m] * factor[m][n]. `bias` and `extra`
// may be null; `factor` is [tokens][cols]; `acc` and `extra` are [cols, padded to kLanes][v *
// kLanes].
template <class S, class T>
void write_tile(const float* acc, int v, int64_t tokens, int64_t cols, const float* bias,
                const float* extra, const float* factor, T* y, int64_t ld) {
  constexpr int L = S::kLanes;
  const int64_t width = v * L;
  for (int64_t m = 0; m < tokens; m += L) {
    const int count = static_cast<int>(tokens - m < L ? tokens - m : L);
    for (int64_t n = 0; n < cols; n += L) {
      const int left = static_cast<int>(cols - n < L ? cols - n : L);
      const typename S::F shift = bias != nullptr ? S::load_n(bias + n, left) : S::zero();
      typename S::F square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = S::load(acc + (n + i) * width + m);
      S::transpose(square);
      if (extra != nullptr) {
        typename S::F more[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) more[i] = S::load(extra + (n + i) * width + m);
        S::transpose(more);
        for (int i = 0; i < count; ++i) {
          square[i] = S::fma(more[i], S::load_n(factor + (m + i) * cols + n, left), square[i]);
        }
      }
      T* out = y + m * ld + n;
      if (left == L && count == L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) S::store(out + i * ld, S::add(square[i], shift));
      } else {
        for (int i = 0; i < count; ++i) S::store_n(out + i * ld, S::add(square[i], shift), left);
      }
    }
  }
}

}  // namespace pylora::cpu
