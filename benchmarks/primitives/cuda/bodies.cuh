// The bodies of timed loops that several programs use: look-ups in the decode table, and mma.sync.
#pragma once

#include "cuda/nf4/nf4_decode.cuh"
#include "timed_loop.cuh"

namespace primitives {

__device__ __forceinline__ uint32_t volatile_load(uint32_t address) {
  uint32_t value;
  asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}

// Fills `bytes` of shared memory; word i is scramble(i).
__device__ inline void fill_words(uint8_t* shared, int bytes, int thread, int threads) {
  for (int i = thread; i < bytes / 4; i += threads) {
    reinterpret_cast<uint32_t*>(shared)[i] = scramble(i);
  }
}

// Adds up what the slots of a round have loaded. One IADD3 adds two of them.
struct SlotSums {
  uint32_t loaded[kSlots], sum = 0;

  __device__ __forceinline__ void add_round() {
#pragma unroll
    for (int i = 0; i < kSlots; i += 2) sum += loaded[i] + loaded[i + 1];
  }
};

// LDS.32 alone: looks up fixed random entries in a table like that of nf4/nf4_decode.cuh.
struct PrivateTable : PlainBody {
  static constexpr int kSharedBytes = kPairBytes;
  static __host__ __device__ uint32_t offset(int thread, int slot) {
    return scramble(thread * kSlots + slot) % kPairEntries * kPairRow + 4 * (thread % 32);
  }
  static __device__ void prepare(uint8_t* shared, int thread, int threads) {
    fill_words(shared, kSharedBytes, thread, threads);
  }
  __device__ PrivateTable(uint8_t* shared, const Input&, int thread) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) address[i] = shared_address(shared) + offset(thread, i);
  }
  __device__ __forceinline__ void slot(int i) { sums.loaded[i] = volatile_load(address[i]); }
  __device__ __forceinline__ void end_round() { sums.add_round(); }
  __device__ uint32_t result() { return sums.sum; }
  static uint32_t expected(int thread, uint32_t rounds) {
    uint32_t sum = 0;
    for (int i = 0; i < kSlots; ++i) sum += scramble(offset(thread, i) / 4);
    return rounds * sum;
  }

  uint32_t address[kSlots];
  SlotSums sums;
};

// Decodes as the kernels do: a PRMT and an LDS for each byte of two words of qweight, with a table
// like that of nf4/nf4_decode.cuh. Each round has other words.
struct DecodeTable : PlainBody {
  static constexpr int kSharedBytes = kPairBytes;
  static constexpr uint32_t kStep = 0x3B1D2F47u;
  static __device__ void prepare(uint8_t* shared, int thread, int threads) {
    fill_words(shared, kSharedBytes, thread, threads);
  }
  __device__ DecodeTable(uint8_t* shared, const Input&, int thread)
      : pairs(shared), lane_offset(4 * (thread % 32)) {
    words[0] = scramble(2 * thread);
    words[1] = scramble(2 * thread + 1);
  }
  __device__ __forceinline__ void slot(int i) {
    sums.loaded[i] = decode_pair(pairs, lane_offset, words[i / 4], i % 4);
  }
  __device__ __forceinline__ void end_round() {
    sums.add_round();
    words[0] += kStep;
    words[1] += kStep;
  }
  __device__ uint32_t result() { return sums.sum; }
  static uint32_t expected(int thread, uint32_t rounds) {
    uint32_t sum = 0;
    for (int which = 0; which < 2; ++which) {
      uint32_t word = scramble(2 * thread + which);
      for (uint32_t round = 0; round < rounds; ++round, word += kStep) {
        for (int byte = 0; byte < 4; ++byte) {
          const uint32_t entry = word >> 8 * byte & 0xFF;
          sum += scramble((entry * kPairRow + 4 * (thread % 32)) / 4);
        }
      }
    }
    return sum;
  }

  const uint8_t* pairs;
  uint32_t lane_offset, words[2];
  SlotSums sums;
};

// The operands of matrix products are small integers, so that all sums are exact.
__host__ __device__ constexpr uint32_t a_element(int row, int k) {
  return scramble(row * 64 + k) & 3;
}
__host__ __device__ constexpr uint32_t b_element(int k, int column) {
  return scramble((column + 64) * 64 + k) & 3;
}
// The bits of 0, 1, 2 and 3 in bf16.
__host__ __device__ constexpr uint32_t bf16_bits(uint32_t value) {
  return value == 0 ? 0 : value == 1 ? 0x3F80 : value == 2 ? 0x4000 : 0x4040;
}
__device__ __forceinline__ uint32_t a_pair(int row, int k) {
  return bf16_bits(a_element(row, k)) | bf16_bits(a_element(row, k + 1)) << 16;
}
__device__ __forceinline__ uint32_t b_pair(int k, int column) {
  return bf16_bits(b_element(k, column)) | bf16_bits(b_element(k + 1, column)) << 16;
}

// mma.m16n8k16 of bf16 in the first kUsed slots. Each slot has a sum of its own.
template <int kUsed>
struct Mma : PlainBody {
  __device__ Mma(uint8_t*, const Input&, int thread) {
    const int row = thread % 32 / 4, k = 2 * (thread % 4);
    for (int i = 0; i < 4; ++i) a[i] = a_pair(row + i % 2 * 8, k + i / 2 * 8);
    for (int i = 0; i < 2; ++i) b[i] = b_pair(k + i * 8, row);
#pragma unroll
    for (int i = 0; i < kUsed; ++i) {
      for (int j = 0; j < 4; ++j) d[i][j] = static_cast<float>(i);
    }
  }
  __device__ __forceinline__ void slot(int i) {
    if (i < kUsed) mma_16x8x16<__nv_bfloat16>(d[i], a, b[0], b[1]);
  }
  __device__ uint32_t result() {
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kUsed; ++i) {
      for (int j = 0; j < 4; ++j) sum += static_cast<uint32_t>(d[i][j]);
    }
    return sum;
  }
  static uint32_t expected(int thread, uint32_t rounds) {
    uint32_t sum = 0;
    for (int j = 0; j < 4; ++j) {
      const int row = thread % 32 / 4 + j / 2 * 8, column = 2 * (thread % 4) + j % 2;
      uint32_t product = 0;
      for (int k = 0; k < 16; ++k) product += a_element(row, k) * b_element(k, column);
      for (int i = 0; i < kUsed; ++i) sum += rounds * product + i;
    }
    return sum;
  }

  uint32_t a[4], b[2];
  float d[kUsed][4];
};

}  // namespace primitives
