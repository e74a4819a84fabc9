// Decodes NF4 into the panels that gemm_tile.h multiplies: fp32, or pairs of bf16 along the sum.
//
// A panel covers some rows and columns of W [out_features, in_features]. The forward sums over
// columns, and its panel is row-major: one row of W is one row of the panel. The backward sums over
// rows, and its panel is column-major.
#pragma once

#include <cstring>

#include "common/float16.h"
#include "common/nf4.h"
#include "cpu/gemm_tile.h"

namespace pylora::cpu {

inline constexpr int64_t kGroup = 32;  // such aligned weights share an absmax

// If each row starts at a multiple of 32 flat elements, it falls into groups of 32 that each lie
// within one block.
PYLORA_INLINE bool has_aligned_groups(const NF4Matrix& w) { return w.cols % kGroup == 0; }

// So many weights, in blocks of 64 (the default), have absmax values that fill a cache line.
inline constexpr int64_t kLineAhead = 1024;

// The absmax of each group of 32 weights in a stretch of the flat weight.
template <class S>
struct GroupScales {
  static constexpr int64_t kMaxGroups = 256;
  const float* absmax;
  int64_t phase;  // of the first element within its block
  int shift;      // log2(blocksize)
  float decoded[kMaxGroups + 1];

  // The next look-up will be `ahead` weights further on.
  PYLORA_INLINE void find(const NF4Matrix& w, int64_t first, int64_t count, int64_t ahead) {
    shift = __builtin_ctzll(static_cast<unsigned long long>(w.blocksize));
    phase = first & (w.blocksize - 1);
    const int64_t block = first >> shift;
    if (!w.nested()) {
      absmax = w.absmax + block;
      __builtin_prefetch(absmax + (ahead >> shift));
    } else {
      const int64_t blocks = ((phase + count - 1) >> shift) + 1;
      int64_t outer = block / w.nested_blocksize;
      int64_t left = w.nested_blocksize - block % w.nested_blocksize;
      for (int64_t i = 0; i < blocks; ++i, --left) {
        if (left == 0) {
          ++outer;
          left = w.nested_blocksize;
        }
        const float product = w.nested_code[w.absmax_q[block + i]] * w.nested_absmax[outer];
        decoded[i] = product + w.offset;
      }
      __builtin_prefetch(w.absmax_q + block + (ahead >> shift));
      absmax = decoded;
    }
  }
  PYLORA_INLINE float operator()(int64_t group) const {
    return absmax[(phase + kGroup * group) >> shift];
  }
};

// Decodes a stretch of any alignment: one weight at a time, with a table for each block.
template <class S>
__attribute__((noinline)) void decode_stretch(const NF4Matrix& w, int64_t first, int64_t count,
                                              float* out) {
  int64_t e = first;
  while (e < first + count) {
    const int64_t block = e / w.blocksize;
    const int64_t block_end = (block + 1) * w.blocksize;
    const int64_t end = block_end < first + count ? block_end : first + count;
    const float absmax = w.absmax_at(block);
    float table[kNF4Size];
    for (int i = 0; i < kNF4Size; ++i) table[i] = kNF4Code[i] * absmax;
    for (; e < end; ++e) *out++ = table[nf4_code_at(w.qweight, e)];
  }
}

// Decodes W[row, col .. col + count) to fp32. With aligned groups, `col` and `count` are multiples
// of 32.
template <class S>
PYLORA_INLINE void decode_row_f32(const NF4Matrix& w, int64_t row, int64_t col, int64_t count,
                                  int64_t ahead, float* out) {
  const int64_t first = row * w.cols + col;
  if (!has_aligned_groups(w)) return decode_stretch<S>(w, first, count, out);
  GroupScales<S> scale;
  scale.find(w, first, count, 2 * ahead);
  const uint8_t* q = w.qweight + first / 2;
  for (int64_t g = 0; g < count / kGroup; ++g) {
    const float absmax = scale(g);
    __builtin_prefetch(q + g * kGroup / 2 + ahead);
#pragma GCC unroll 8
    for (int i = 0; i < kGroup; i += S::kLanes) {
      S::store(out + g * kGroup + i, S::decode(q + (g * kGroup + i) / 2, absmax));
    }
  }
}

// The forward panel [rows][kTileLd]: columns col .. col + count of `rows` rows of W. It reads only
// a short stretch of each row, so the hardware cannot foresee what comes next: that lies `ahead`
// bytes further on, and is prefetched.
template <class S>
void decode_panel(F32Mac<S>, const NF4Matrix& w, int64_t row, int64_t rows, int64_t col,
                  int64_t count, int64_t ahead, float* panel) {
  for (int64_t i = 0; i < rows; ++i) {
    decode_row_f32<S>(w, row + i, col, count, ahead, panel + i * kTileLd);
  }
}

// The backward panel [count][ld]: columns col .. col + cols of `count` rows of W.
template <class S>
void decode_panel_t(F32Mac<S>, const NF4Matrix& w, int64_t row, int64_t count, int64_t col,
                    int64_t cols, float* panel, int64_t ld) {
  for (int64_t i = 0; i < count; ++i) {
    decode_row_f32<S>(w, row + i, col, cols, cols / 2, panel + i * ld);
  }
}

template <class S>
PYLORA_INLINE void decode_row_bf16(const NF4Matrix& w, int64_t row, int64_t col, int64_t count,
                                   int64_t ahead, float* out) {
  const int64_t first = row * w.cols + col;
  if (!has_aligned_groups(w)) {
    float wide[2 * kTileK];
    decode_stretch<S>(w, first, count, wide);
    auto* narrow = reinterpret_cast<BFloat16*>(out);
    for (int64_t i = 0; i < count; ++i) narrow[i] = from_float<BFloat16>(wide[i]);
    if (count % 2 != 0) narrow[count].bits = 0;
    return;
  }
  GroupScales<S> scale;
  scale.find(w, first, count, 2 * ahead);
  const uint8_t* q = w.qweight + first / 2;
  for (int64_t k = 0; k < count; k += 4 * kGroup) {
    __builtin_prefetch(q + k / 2 + ahead);
    const auto group = [&](int g) { return scale(k / kGroup + g); };
    const int64_t left = (count - k) / kGroup;
    if (left >= 4) {
      S::template decode_row_128<true>(q + k / 2, group, 4, out + k / 2);
    } else {
      S::template decode_row_128<false>(q + k / 2, group, static_cast<int>(left), out + k / 2);
    }
  }
}

template <class S>
void decode_panel(Bf16Mac<S>, const NF4Matrix& w, int64_t row, int64_t rows, int64_t col,
                  int64_t count, int64_t ahead, float* panel) {
  for (int64_t i = 0; i < rows; ++i) {
    decode_row_bf16<S>(w, row + i, col, count, ahead, panel + i * kTileLd);
  }
}

template <class S>
void decode_panel_t(Bf16Mac<S>, const NF4Matrix& w, int64_t row, int64_t count, int64_t col,
                    int64_t cols, float* panel, int64_t ld) {
  for (int64_t i = 0; i < count; i += 2, panel += ld) {
    const bool pair = i + 1 < count;
    const int64_t first = (row + i) * w.cols + col;
    if (!has_aligned_groups(w)) {
      float wide[2][kTileK];
      decode_stretch<S>(w, first, cols, wide[0]);
      std::memset(wide[1], 0, sizeof wide[1]);
      if (pair) decode_stretch<S>(w, first + w.cols, cols, wide[1]);
      auto* narrow = reinterpret_cast<BFloat16*>(panel);
      for (int64_t k = 0; k < cols; ++k) {
        narrow[2 * k] = from_float<BFloat16>(wide[0][k]);
        narrow[2 * k + 1] = from_float<BFloat16>(wide[1][k]);
      }
      continue;
    }
    const int64_t second = pair ? first + w.cols : first;
    GroupScales<S> scale;
    scale.find(w, first, cols, kLineAhead);
    GroupScales<S> next_scale;
    next_scale.find(w, second, cols, kLineAhead);
    __builtin_prefetch(w.qweight + (first + cols) / 2 + 63);
    __builtin_prefetch(w.qweight + (second + cols) / 2 + 63);
    for (int64_t k = 0; k < cols; k += kGroup) {
      S::decode_pair_32(w.qweight + (first + k) / 2, w.qweight + (second + k) / 2,
                        scale(k / kGroup), pair ? next_scale(k / kGroup) : 0.0f, panel + k);
    }
  }
}

}  // namespace pylora::cpu
