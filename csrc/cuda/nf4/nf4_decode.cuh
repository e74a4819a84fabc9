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

#include "common/nf4.h"
#include "cuda/common/element.cuh"
#include "cuda/common/ptx.cuh"

namespace pylora::cuda {

// CODE
static __constant__ float nf4_code[kNF4Size] = {
    kNF4Code[0],  kNF4Code[1],  kNF4Code[2],  kNF4Code[3],  kNF4Code[4],  kNF4Code[5],
    kNF4Code[6],  kNF4Code[7],  kNF4Code[8],  kNF4Code[9],  kNF4Code[10], kNF4Code[11],
    kNF4Code[12], kNF4Code[13], kNF4Code[14], kNF4Code[15],
};

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

// ABSMAX
struct StoredAbsmax {
  float value = 0.0f;  // plain: absmax; nested: nested_absmax
  uint32_t code = 0;   // nested

  __device__ __forceinline__ void load(const NF4Matrix& weight, uint32_t block, int nested_shift) {
    if (weight.absmax_q == nullptr) {
      value = __ldg(weight.absmax + block);
    } else {
      code = __ldg(weight.absmax_q + block);
      value = __ldg(weight.nested_absmax + (block >> nested_shift));
    }
  }

  __device__ __forceinline__ float decode(const NF4Matrix& weight, float offset) const {
    if (weight.absmax_q == nullptr) return value;
    return __fadd_rn(__fmul_rn(__ldg(weight.nested_code + code), value), offset);
  }
};

}  // namespace pylora::cuda
