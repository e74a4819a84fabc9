// The forward of nf4_linear.h for a few tokens: dot products with rows of W, which are decoded in
// registers.
//
// Shapes    x [M, K], M <= kMaxSmallM; K % 32 == 0
// Numerics  as nf4_linear.h. Products are summed with the bare codes; the absmax of a lane's
//           weights then multiplies the lane's sum over a chunk. This works because a lane never
//           leaves a group of 32 weights.
// Algorithm 1. Pack the tokens once, in the order in which weights come out of the decoder.
//           2. Decode a chunk of a row of W: 8 * kLanes weights, one 32-bit word of packed weights
//              for each lane. Shifting the words by 4 j brings nibble j of each word to where a
//              permute reads its index, so one shift and one permute decode a vector of weights, in
//              the order (lane, j ^ 1).
//           3. Multiply it by each token and add up.
//           4. Add the low-rank term and the bias, round and store.
#pragma once

#include <type_traits>

#include "cpu/gemm_pack.h"
#include "cpu/nf4_linear.h"
#include "cpu/nf4_panel.h"
#include "cpu/parallel.h"
#include "cpu/small_m_rows.h"
#include "cpu/workspace.h"

namespace pylora::cpu {

// How many weights of a row are read in one go. The tokens' values for them must stay in the
// first-level cache, so more tokens mean a shorter stretch.
template <int kTokens>
inline constexpr int64_t kSmallMStretch = kTokens <= 3 ? 8192 : 2048;
inline constexpr int64_t kPrefetchBytes = 2048;  // the least distance at which W is prefetched
inline constexpr int64_t kRowBatch = 16;
inline constexpr int64_t kTokenBytes = 32 * 1024;  // packed tokens that the first-level cache holds

template <class S, template <class> class Mac>
struct SmallMLayout {
  static constexpr int kWeights = 8 * S::kLanes;        // in a chunk
  static constexpr int kVectors = 8 / Mac<S>::kStep;    // decoded vectors in a chunk
  static constexpr int kFloats = kVectors * S::kLanes;  // 32-bit elements in a chunk
  static constexpr int kGroups = kWeights / static_cast<int>(kGroup);
};

// 1. Packs one token in the order of the decoded weights, with zeros after its last value. The same
// chunk of all tokens lies together: `stride` floats separate a token's chunk from its next one.
template <class S, template <class> class Mac, class T>
void pack_token(const T* x, int64_t depth, float* packed, int64_t stride) {
  using Layout = SmallMLayout<S, Mac>;
  using Value = std::conditional_t<Mac<S>::kStep == 1, float, BFloat16>;
  constexpr int kUnit = Layout::kVectors;  // consecutive values in one lane of one permute
  constexpr int kPlaces = Layout::kWeights / kUnit;
  for (int64_t k = 0; k < depth; k += Layout::kWeights, packed += stride) {
    auto* out = reinterpret_cast<Value*>(packed);
    const int64_t left = depth - k < Layout::kWeights ? depth - k : Layout::kWeights;
    for (int place = 0; place < kPlaces; ++place) {
      for (int j = 0; j < kUnit; ++j) {
        const int i = place * kUnit + (j ^ 1);
        Value value{};
        if (i < left) {
          if constexpr (Mac<S>::kStep == 1) {
            value = to_float(x[k + i]);
          } else {
            value = x[k + i];
          }
        }
        out[j * kPlaces + place] = value;
      }
    }
  }
}

// How the absmax values of a chunk are found.
enum class ChunkScales {
  kShared,   // a block has whole chunks: one absmax a chunk
  kHalves,   // a chunk has two blocks: the default blocksize, 64, on AVX-512
  kGeneral,  // one look-up for each group of 32
};

// The absmax of chunk `c` of the stretch, for each lane.
template <class S, int kGroups, ChunkScales kScales>
PYLORA_INLINE typename S::F chunk_absmax(const GroupScales<S>& scale, int64_t c, int64_t groups) {
  if constexpr (kScales == ChunkScales::kShared) {
    return S::set1(scale(c * kGroups));
  } else if constexpr (kScales == ChunkScales::kHalves) {
    return S::spread({scale.absmax[2 * c], scale.absmax[2 * c + 1]});
  } else {
    float part[kGroups];
#pragma GCC unroll 4
    for (int i = 0; i < kGroups; ++i) {
      const int64_t g = c * kGroups + i;
      part[i] = scale(g < groups ? g : groups - 1);
    }
    return S::spread(part);
  }
}

// 2. and 3. acc[n][m] += one chunk of row n times token m. Rows are `bytes` apart.
template <class S, template <class> class Mac, int kTokens, int kRows, class Table>
PYLORA_INLINE void add_chunk(const uint8_t* q, int64_t bytes, int64_t left, const Table& table,
                             const typename S::F (&absmax)[kRows], const float* x,
                             typename S::F (&acc)[kRows][kTokens]) {
  constexpr int kVectors = SmallMLayout<S, Mac>::kVectors;
  typename S::F weights[kRows][kVectors];
#pragma GCC unroll 2
  for (int n = 0; n < kRows; ++n) S::decode_chunk(q + n * bytes, left, table, weights[n]);
#pragma GCC unroll 8
  for (int m = 0; m < kTokens; ++m) {
    typename S::F sum[kRows];
#pragma GCC unroll 2
    for (int n = 0; n < kRows; ++n) sum[n] = S::zero();
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const typename S::F value = S::load(x + (m * kVectors + j) * S::kLanes);
#pragma GCC unroll 2
      for (int n = 0; n < kRows; ++n) sum[n] = Mac<S>::mac(sum[n], weights[n][j], value);
    }
#pragma GCC unroll 2
    for (int n = 0; n < kRows; ++n) acc[n][m] = S::fma(sum[n], absmax[n], acc[n][m]);
  }
}

// sums[n][m] (+)= one stretch, from column k0 on, of rows [row, row + kRows) times tokens [token,
// token + kTokens). The weights that are read next lie `ahead` bytes after these.
template <class S, template <class> class Mac, int kTokens, int kRows, ChunkScales kScales>
PYLORA_INLINE void add_stretch(const NF4LinearArgs& args, const float* packed, int64_t token,
                               int64_t row, int64_t k0, int64_t ahead,
                               typename S::F (*sums)[kTokens]) {
  using F = typename S::F;
  using Layout = SmallMLayout<S, Mac>;
  constexpr int64_t kBytes = Layout::kWeights / 2;
  const NF4Matrix& w = args.weight;
  const int64_t bytes = w.cols / 2;
  const int64_t stride = args.tokens * Layout::kFloats;
  const int64_t count =
      w.cols - k0 < kSmallMStretch<kTokens> ? w.cols - k0 : kSmallMStretch<kTokens>;
  const int64_t groups = count / kGroup;
  const int64_t whole = count / Layout::kWeights;
  const auto table = S::chunk_table(Mac<S>{});
  const float* x = packed + k0 / Layout::kWeights * stride + token * Layout::kFloats;
  const uint8_t* q = w.qweight + row * bytes + k0 / 2;
  GroupScales<S> scale[kRows];
  F acc[kRows][kTokens];
#pragma GCC unroll 2
  for (int n = 0; n < kRows; ++n) {
    scale[n].find(w, (row + n) * w.cols + k0, count, kLineAhead);
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) acc[n][m] = k0 > 0 ? sums[n][m] : S::zero();
  }
  int64_t c = 0;
  for (; c < whole; ++c, q += kBytes, x += stride) {
    F absmax[kRows];
#pragma GCC unroll 2
    for (int n = 0; n < kRows; ++n) {
      __builtin_prefetch(q + n * bytes + ahead);
      absmax[n] = chunk_absmax<S, Layout::kGroups, kScales>(scale[n], c, groups);
    }
    add_chunk<S, Mac>(q, bytes, Layout::kWeights, table, absmax, x, acc);
  }
  if (c * Layout::kGroups < groups) {  // the end of the row
    F absmax[kRows];
#pragma GCC unroll 2
    for (int n = 0; n < kRows; ++n) {
      absmax[n] = chunk_absmax<S, Layout::kGroups, ChunkScales::kGeneral>(scale[n], c, groups);
    }
    add_chunk<S, Mac>(q, bytes, count - c * Layout::kWeights, table, absmax, x, acc);
  }
#pragma GCC unroll 2
  for (int n = 0; n < kRows; ++n) {
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) sums[n][m] = acc[n][m];
  }
}

// Rows [row, row + rows) of W. `rows` is a multiple of kRows and at most kRowBatch. The outer loop
// goes over stretches, so that the tokens' stretch stays in the first-level cache for all rows.
template <class S, template <class> class Mac, int kTokens, int kRows, ChunkScales kScales>
PYLORA_INLINE void small_m_rows(const NF4LinearArgs& args, const float* packed, int64_t token,
                                int64_t row, int64_t rows) {
  typename S::F sums[kRowBatch][kTokens];
  const int64_t cols = args.weight.cols;
  const int64_t bytes = cols / 2;
  for (int64_t k0 = 0; k0 < cols; k0 += kSmallMStretch<kTokens>) {
    for (int64_t n = 0; n < rows; n += kRows) {
      int64_t ahead = round_up(kPrefetchBytes, kRows * bytes);
      if (rows > kRows && n + kRows == rows) {
        ahead = k0 + kSmallMStretch<kTokens> < cols ? kSmallMStretch<kTokens> / 2 - n * bytes
                                                    : kRows * bytes - k0 / 2;
      }
      add_stretch<S, Mac, kTokens, kRows, kScales>(args, packed, token, row + n, k0, ahead,
                                                   sums + n);
    }
  }
  // 4. Add the low-rank term and the bias, round and store.
  const typename S::F scale = S::set1(S::chunk_scale(Mac<S>{}));
  for (int64_t n = 0; n < rows; ++n) {
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) sums[n][m] = S::mul(sums[n][m], scale);
    finish_row<S, kTokens>(args, token, row + n, sums[n]);
  }
}

template <class S, template <class> class Mac, int kTokens, ChunkScales kScales>
void small_m_range(const NF4LinearArgs& args, const float* packed, int64_t begin, int64_t end) {
  // Two rows at a time share the tokens' loads; for one token there is nothing to gain.
  constexpr int kRows = kTokens == 1 ? 1 : 2;
  const bool resident = kTokens * args.weight.cols * 4 / Mac<S>::kStep <= kTokenBytes;
  const int64_t batch = resident ? kRows : kRowBatch;
  int64_t row = begin;
  while (row + kRows <= end) {
    const int64_t rows = end - row < batch ? (end - row) / kRows * kRows : batch;
    small_m_rows<S, Mac, kTokens, kRows, kScales>(args, packed, 0, row, rows);
    row += rows;
  }
  for (int m = 0; row < end && m < kTokens; ++m) {
    small_m_rows<S, Mac, 1, 1, kScales>(args, packed, m, row, 1);
  }
}

template <class S, template <class> class Mac, int kTokens>
void run_small_m_of(const NF4LinearArgs& args, const float* packed) {
  constexpr int kGroups = SmallMLayout<S, Mac>::kGroups;
  const NF4Matrix& w = args.weight;
  const bool aligned = w.cols % w.blocksize == 0;  // every row starts a block
  parallel_for(0, w.rows, ceil_div(kSmallMGrain, w.cols), [&](int64_t begin, int64_t end) {
    if (aligned && w.blocksize >= kGroups * kGroup) {
      small_m_range<S, Mac, kTokens, ChunkScales::kShared>(args, packed, begin, end);
      return;
    }
    if constexpr (kGroups == 4) {
      if (aligned && w.blocksize == 2 * kGroup) {
        small_m_range<S, Mac, kTokens, ChunkScales::kHalves>(args, packed, begin, end);
        return;
      }
    }
    small_m_range<S, Mac, kTokens, ChunkScales::kGeneral>(args, packed, begin, end);
  });
}

// Returns false, and has done nothing, if this kernel cannot take the call.
template <class S, template <class> class Mac, class T>
bool run_small_m(const NF4LinearArgs& args) {
  using Layout = SmallMLayout<S, Mac>;
  const int64_t chunks = ceil_div(args.weight.cols, Layout::kWeights);
  if (args.tokens > kMaxSmallM || args.backward || !has_aligned_groups(args.weight) ||
      chunks * args.tokens * Layout::kFloats * 4 > static_cast<int64_t>(kWorkspaceBytes)) {
    return false;
  }
  float* packed = thread_workspace();  // read by all threads; none needs its own
  for (int64_t m = 0; m < args.tokens; ++m) {
    pack_token<S, Mac>(static_cast<const T*>(args.x) + m * args.weight.cols, args.weight.cols,
                       packed + m * Layout::kFloats, args.tokens * Layout::kFloats);
  }
  return with_token_count<kMaxSmallM>(args.tokens, [&](auto count) {
    run_small_m_of<S, Mac, decltype(count)::value>(args, packed);
  });
}

}  // namespace pylora::cpu
