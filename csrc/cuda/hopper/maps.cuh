// Who holds what in lora_linear_hopper.cu: plain functions, which a test of the host checks for gaps
// and overlaps. A warpgroup has 128 threads, thread = 32 * warp + lane.
#pragma once

#include "common/nf4.h"
#include "cuda/common/launch.cuh"
#include "cuda/nf4/nf4_decode.cuh"

namespace pylora::cuda {

inline constexpr int kGroupThreads = 128;
inline constexpr int kConsumers = 2;  // warpgroups
inline constexpr int kConsumerWarps = kConsumers * kGroupThreads / kLanes;
inline constexpr int kHopperThreads = (1 + kConsumers) * kGroupThreads;

inline constexpr int kGroupRows = 64;  // of W: the m64 of a product
inline constexpr int kTileRows = kConsumers * kGroupRows;
inline constexpr int kSteps = 4;            // products a k_tile: 4 * 32 bytes along k
inline constexpr int kStepBytes = 32;       // of x along k
inline constexpr int kTokenBytes = 128;     // of x: 64 columns, or 32 of low
inline constexpr int kPackedRowBytes = 32;  // of qweight: 64 columns
inline constexpr int kPackedBytes = kTileRows * kPackedRowBytes;
inline constexpr int kLowColumns = kTokenBytes / 4;
inline constexpr int kStagedTokens = kPairEntries / kConsumers;  // a warpgroup's turn in 6.
inline constexpr int kBatchPairs = 4;                            // stored at a time
inline constexpr int kBatchSums = 8 * kBatchPairs;               // of a thread

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

// A place in the ring of stages. In each round the stage's barriers complete a phase; the parity is
// that of the phase `full` completes in this round, and of the one `empty` completes in it.
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

// Register `i` of the fragment of step `step`: two weights of this row of the warpgroup's, in byte
// `fragment_byte` of this word of the row's 8.
PYLORA_HOST_DEVICE constexpr int fragment_row(int thread, int i) {
  return thread / kLanes * 16 + thread % kLanes / 4 + i % 2 * 8;
}
PYLORA_HOST_DEVICE constexpr int fragment_word(int step, int i) { return 2 * step + i / 2; }
PYLORA_HOST_DEVICE constexpr int fragment_byte(int thread) { return thread % 4; }

// And of a step of TF32: one element, of the 32 that a copy of low holds.
PYLORA_HOST_DEVICE constexpr int fragment_rank(int thread, int step, int i) {
  return 8 * step + thread % 4 + i / 2 * 4;
}

// Where 16 bytes of a row of the packed tile lie: unit 0 or 1, exchanged in every other 4 rows (the
// swizzle by 32 bytes), so that 8 rows of one unit fill all banks.
PYLORA_HOST_DEVICE constexpr int packed_offset(int row, int unit) {
  return row * kPackedRowBytes + (unit ^ row / 4 % 2) * kVectorBytes;
}

// Register `i` of the accumulators has this token of the tile, and the row of fragment_row(i / 2).
PYLORA_HOST_DEVICE constexpr int accumulator_token(int thread, int i) {
  return i / 4 * 8 + 2 * (thread % 4) + i % 2;
}

// Where the workspace has accumulators 4 * i to 4 * i + 3 of a thread, in units of 4 floats.
template <int kTokens>
PYLORA_HOST_DEVICE constexpr int64_t partial_vector(int64_t split, int64_t tiles, int64_t tile,
                                                    int consumer, int i, int thread) {
  const int64_t group = (split * tiles + tile) * kConsumers + consumer;
  return (group * (kTokens / 8) + i) * kGroupThreads + thread;
}

// The outputs of a token, 64 rows of W in 8 units of 16 bytes, fill the hole of the decode table
// with this number; the units change places so that those of 8 tokens lie in different banks.
PYLORA_HOST_DEVICE constexpr int staging_hole(int consumer, int token) {
  return consumer * kStagedTokens + token;
}
PYLORA_HOST_DEVICE constexpr int staging_unit(int token, int unit) { return unit ^ token % 8; }

// stmatrix `pair` of a warp writes four matrices, 8 tokens by 8 rows: this lane gives the address
// of this token and unit, and register i has the accumulators of octet `staged_octet`, row half i
// % 2.
PYLORA_HOST_DEVICE constexpr int staged_token(int pair, int lane) {
  return 16 * pair + lane / 16 * 8 + lane % 8;
}
PYLORA_HOST_DEVICE constexpr int staged_unit(int warp, int lane) { return 2 * warp + lane / 8 % 2; }
PYLORA_HOST_DEVICE constexpr int staged_octet(int pair, int i) { return 2 * pair + i / 2; }

}  // namespace pylora::cuda
