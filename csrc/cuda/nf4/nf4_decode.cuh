// How kernels decode NF4: the code table, a table of pairs in shared memory, and absmax.
//
// The table of pairs decodes a byte of qweight at a time: it gives the two weights of the byte,
// before absmax, as one register of fp16 or bf16 with the even weight in its low half. Every lane
// has a copy of the table in a bank of its own, so look-ups never conflict. Entry b of lane l lies
// at 256 b + 4 l, so one PRMT makes its address out of a word of qweight; rows of 128 bytes would
// need a shift and an AND. The upper half of each row is unused: these 256 holes of 128 bytes hold
// other data of the kernels.
//
// For 32 weights this takes 16 PRMT + 16 LDS in the code for sm_90a. Rows of 128 bytes would take
// 16 LDS + 16 LOP3 + 16 shifts. Decoding in registers, from byte planes, would take 56 PRMT or more
// and as many other instructions.
#pragma once

#include "common/nf4.h"
#include "cuda/common/element.cuh"
#include "cuda/common/ptx.cuh"

namespace pylora::cuda {

// The code table in constant memory, filled from the one in common/nf4.h: a kernel cannot read an
// array of the host.
static __constant__ float nf4_code[kNF4Size] = {
    kNF4Code[0],  kNF4Code[1],  kNF4Code[2],  kNF4Code[3],  kNF4Code[4],  kNF4Code[5],
    kNF4Code[6],  kNF4Code[7],  kNF4Code[8],  kNF4Code[9],  kNF4Code[10], kNF4Code[11],
    kNF4Code[12], kNF4Code[13], kNF4Code[14], kNF4Code[15],
};

inline constexpr int kPairRow = 256;   // bytes from one entry to the next
inline constexpr int kPairHole = 128;  // the hole of a row begins here
inline constexpr int kPairEntries = 256;
inline constexpr int kPairBytes = kPairEntries * kPairRow;

// Fills one entry of the table. kPairEntries threads call this, and the table may be read after a
// barrier.
template <class T>
__device__ __forceinline__ void fill_pairs(uint8_t* pairs, int entry) {
  const uint32_t pair = pack_pair<T>(nf4_code[entry >> 4], nf4_code[entry & 0xF]);
  const uint4 copies = {pair, pair, pair, pair};
  constexpr int kStores = kPairHole / kVectorBytes;
#pragma unroll
  for (int i = 0; i < kStores; ++i) {
    // Each entry begins at another store, so that eight neighbours write to different banks.
    const int store = (i + entry) % kStores;
    uint8_t* place = pairs + entry * kPairRow + store * kVectorBytes;
    store_shared(reinterpret_cast<uint4*>(place), copies);
  }
}

// Decodes byte `byte` of `word`. `lane_offset` is 4 * lane.
__device__ __forceinline__ uint32_t decode_pair(const uint8_t* pairs, uint32_t lane_offset,
                                                uint32_t word, int byte) {
  // The address is [4 * lane, byte of the word, 0, 0]; in the selector, 4 to 7 are the bytes of
  // lane_offset.
  return load_shared(pairs, permute_bytes(word, lane_offset, 0x5504u | byte << 4));
}

// The hole of 128 bytes after entry `index`.
__device__ __forceinline__ uint8_t* hole(uint8_t* pairs, int index) {
  return pairs + index * kPairRow + kPairHole;
}

// absmax on its way through registers, as it lies in memory: a kernel loads the parts of a nested
// absmax some chunks before it needs the value.
struct StoredAbsmax {
  float value = 0.0f;  // absmax, or nested_absmax if absmax is nested
  uint32_t code = 0;   // of a nested absmax: the index into nested_code

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
