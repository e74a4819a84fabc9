// Which thread of hopper/lora_linear.cu holds what, and where it lies in memory. These are plain
// functions, so that a test on the host can check each map for gaps and overlaps. A warpgroup has
// 128 threads: thread = 32 * warp + lane.
#pragma once

#include "common/nf4.h"
#include "cuda/common/launch.cuh"
#include "cuda/nf4/nf4_decode.cuh"

namespace pylora::cuda {

inline constexpr int kGroupThreads = 128;
inline constexpr int kConsumers = 2;  // warpgroups
inline constexpr int kConsumerWarps = kConsumers * kGroupThreads / kLanes;
inline constexpr int kHopperThreads = (1 + kConsumers) * kGroupThreads;

inline constexpr int kGroupRows = 64;  // rows of W: the m64 of a product
inline constexpr int kTileRows = kConsumers * kGroupRows;
inline constexpr int kSteps = 4;            // products in a K tile: 4 * 32 bytes along k
inline constexpr int kStepBytes = 32;       // bytes of x that a product reads along k
inline constexpr int kTokenBytes = 128;     // of a token in a stage: 64 columns of x, or 32 of low
inline constexpr int kPackedRowBytes = 32;  // bytes of a row of qweight in a stage: 64 columns
inline constexpr int kPackedBytes = kTileRows * kPackedRowBytes;
inline constexpr int kLowColumns = kTokenBytes / 4;
inline constexpr int kStagedTokens = kPairEntries / kConsumers;  // by a consumer in a turn
inline constexpr int kBatchPairs = 4;                            // stmatrix instructions in a batch
inline constexpr int kBatchSums = 8 * kBatchPairs;  // accumulators of a thread in a batch

template <int kTokens>
struct HopperStages {
  static constexpr int kXBytes = kTokens * kTokenBytes;
  static constexpr int kBytes = kXBytes + kPackedBytes;
  static constexpr int kCount = kTokens == 256 ? 4 : 8;
  static constexpr int kBarrierBytes = 2 * kCount * 8;
  static constexpr int kFlagBytes = kConsumers * 4;
  static constexpr int kSharedBytes = kPairBytes + kCount * kBytes + kBarrierBytes + kFlagBytes;
  static_assert(kXBytes % 1024 == 0 && kBytes % 1024 == 0 && kPairBytes % 1024 == 0);
  static_assert(kSharedBytes <= 227 << 10);
};

// A place in the ring of stages. In each round through the ring, both barriers of a stage complete
// one phase; `parity` is the parity of that phase.
struct RingPlace {
  int stage = 0;
  int parity = 0;

  PYLORA_HOST_DEVICE constexpr void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Register `i` of the fragment of step `step` has two weights. They lie in row fragment_row of the
// warpgroup's 64, in byte fragment_byte of word fragment_word of that row's 8.
PYLORA_HOST_DEVICE constexpr int fragment_row(int thread, int i) {
  return thread / kLanes * 16 + thread % kLanes / 4 + i % 2 * 8;
}
PYLORA_HOST_DEVICE constexpr int fragment_word(int step, int i) { return 2 * step + i / 2; }
PYLORA_HOST_DEVICE constexpr int fragment_byte(int thread) { return thread % 4; }

// In a TF32 product, register `i` of step `step` has one element: this column out of the 32 that a
// copy of low holds.
PYLORA_HOST_DEVICE constexpr int fragment_rank(int thread, int step, int i) {
  return 8 * step + thread % 4 + i / 2 * 4;
}

// The offset of 16 bytes of a row in the tile of qweight. Unit 0 and unit 1 change places in every
// other group of 4 rows (the swizzle by 32 bytes), so that the same unit of 8 rows fills all banks.
PYLORA_HOST_DEVICE constexpr int packed_offset(int row, int unit) {
  return row * kPackedRowBytes + (unit ^ row / 4 % 2) * kVectorBytes;
}

// The place in the workspace, in units of 4 floats, of accumulators 4 * i to 4 * i + 3 of a thread.
template <int kTokens>
PYLORA_HOST_DEVICE constexpr int64_t partial_vector(int64_t split, int64_t tiles, int64_t tile,
                                                    int consumer, int i, int thread) {
  const int64_t group = (split * tiles + tile) * kConsumers + consumer;
  return (group * (kTokens / 8) + i) * kGroupThreads + thread;
}

// Step 7 stages the outputs of a token in one hole of the decode table: 64 rows of W, in 8 units of
// 16 bytes. The units change places, so that the same unit of 8 tokens lies in different banks.
PYLORA_HOST_DEVICE constexpr int staging_hole(int consumer, int token) {
  return consumer * kStagedTokens + token;
}
PYLORA_HOST_DEVICE constexpr int staging_unit(int token, int unit) { return unit ^ token % 8; }

// stmatrix number `pair` of a warp writes four matrices of 8 tokens by 8 rows. A lane gives the
// address of token staged_token and unit staged_unit. Register i has the accumulators of the 8
// tokens staged_octet, in the upper (i % 2 == 0) or lower 8 rows of the warp's 16.
PYLORA_HOST_DEVICE constexpr int staged_token(int pair, int lane) {
  return 16 * pair + lane / 16 * 8 + lane % 8;
}
PYLORA_HOST_DEVICE constexpr int staged_unit(int warp, int lane) { return 2 * warp + lane / 8 % 2; }
PYLORA_HOST_DEVICE constexpr int staged_octet(int pair, int i) { return 2 * pair + i / 2; }

}  // namespace pylora::cuda
