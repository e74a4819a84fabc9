// The fragments that the products of lora_linear_hopper.cu take from registers: W, and lora_B.
#pragma once

#include "cuda/common/element.cuh"
#include "cuda/hopper/lora_linear.cuh"
#include "cuda/hopper/maps.cuh"
#include "cuda/hopper/ptx.cuh"
#include "cuda/nf4/nf4_decode.cuh"

#if PYLORA_SM90A

namespace pylora::cuda {

// absmax as two numbers of T whose sum it is, each twice in a register.
template <class T>
struct Scale {
  uint32_t high, low;
};
template <class T>
__device__ __forceinline__ Scale<T> scale_of(float absmax) {
  const float rest = absmax - to_fp32(round_to<T>(absmax));
  return {pack_pair<T>(absmax, absmax), pack_pair<T>(rest, rest)};
}

// 3. The fragments of a k_tile out of the warpgroup's 64 rows of the packed tile.
template <class T>
__device__ __forceinline__ void decode_k_tile(uint32_t (&fragments)[kSteps][4],
                                              const uint8_t* pairs, const uint8_t* packed,
                                              const Scale<T> (&scales)[2], int thread) {
  const uint32_t lane_offset = 4 * static_cast<uint32_t>(thread % kLanes);
  uint4 units[2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      const int offset = packed_offset(fragment_row(thread, half), unit);
      units[half][unit] = load_shared(reinterpret_cast<const uint4*>(packed + offset));
    }
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int word = fragment_word(step, i);
      const uint4& unit = units[i % 2][word / 4];
      const uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
      const uint32_t codes =
          decode_pair(pairs, lane_offset, words[word % 4], fragment_byte(thread));
      const Scale<T>& scale = scales[i % 2];
      fragments[step][i] = fma_pair<T>(codes, scale.high, multiply_pair<T>(codes, scale.low));
    }
  }
}

// 5. lora_B as fragments, from column `first` of the rank on; 0 outside of it.
__device__ __forceinline__ void load_lora_B(uint32_t (&fragments)[kSteps][4],
                                            const LoraLinearArgs& args, int64_t first_row,
                                            int first, int thread) {
  const TypedVector lora_B = {args.lora_B, args.shrink.dtype};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t n = first_row + fragment_row(thread, i);
      const int r = first + fragment_rank(thread, step, i);
      const bool valid = n < args.weight.rows && r < args.shrink.rank;
      const float value = valid ? load_any(lora_B, n * args.shrink.rank + r) : 0.0f;
      fragments[step][i] = to_tf32(value);
    }
  }
}

}  // namespace pylora::cuda

#endif
