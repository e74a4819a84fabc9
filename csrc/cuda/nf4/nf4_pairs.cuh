// NF4 decoded by a byte at a time: a table in shared memory gives the two weights of a byte of
// qweight as one register of fp16 or bf16, the even weight in its low half.
//
// Every lane has a copy in a bank of its own, so that a lookup never meets a conflict. Entry b of
// lane l lies at 256 b + 4 l: then one PRMT makes the address of a lookup out of a word of qweight,
// where rows of 128 bytes would take a shift and an AND. The upper half of each row is left over,
// 256 times 128 bytes; the kernels keep other things in these holes.
//
// For 32 weights this is 16 PRMT + 16 LDS in the code for sm_90a. Rows of 128 bytes take 16 LDS +
// 16 LOP3 + 16 shifts; byte planes in registers 56 PRMT and more, and as many others again.
#pragma once

#include "cuda/common/element.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/nf4/nf4_code.cuh"

namespace pylora::cuda {

inline constexpr int kPairRow = 256;   // bytes, from one entry to the next
inline constexpr int kPairHole = 128;  // where the hole of a row begins
inline constexpr int kPairEntries = 256;
inline constexpr int kPairBytes = kPairEntries * kPairRow;

// Written by kPairEntries threads, one entry each; they may be read after a barrier.
template <class T>
__device__ __forceinline__ void fill_pairs(uint8_t* pairs, int entry) {
  const uint32_t pair = pack_pair<T>(nf4_code[entry >> 4], nf4_code[entry & 0xF]);
  const uint4 copies = {pair, pair, pair, pair};
  constexpr int kStores = kPairHole / kVectorBytes;
#pragma unroll
  for (int i = 0; i < kStores; ++i) {
    // Turned by the entry's number: eight neighbours write to different banks.
    const int store = (i + entry) % kStores;
    uint8_t* place = pairs + entry * kPairRow + store * kVectorBytes;
    store_shared(reinterpret_cast<uint4*>(place), copies);
  }
}

// The weights of byte `which` of `word`. `lane_offset` is 4 * lane.
__device__ __forceinline__ uint32_t decode_pair(const uint8_t* pairs, uint32_t lane_offset,
                                                uint32_t word, int which) {
  // Bytes 4 to 7 are lane_offset's: [4 * lane, byte of the word, 0, 0].
  return load_shared(pairs, permute_bytes(word, lane_offset, 0x5504u | which << 4));
}

// The 128 bytes behind entry `index`.
__device__ __forceinline__ uint8_t* hole(uint8_t* pairs, int index) {
  return pairs + index * kPairRow + kPairHole;
}

}  // namespace pylora::cuda
