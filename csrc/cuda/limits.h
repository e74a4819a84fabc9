// The hard limits of the kernels of this folder. Python's planners read them from build_info(), in
// builds without CUDA too, so this file includes no CUDA header.
#pragma once

#include <cstdint>

namespace pylora::cuda {

inline constexpr int64_t kMaxRank = 1024;
inline constexpr int64_t kMaxElements = int64_t{1} << 35;  // blocks are counted in 32 bits
inline constexpr int64_t kAlignment = 16;    // bytes, for what is read 16 bytes at a time
inline constexpr int64_t kMaxM = 8 * 65535;  // tokens of the kernels for many tokens, by their grid

// The kernels in small_m/ take at most so many tokens; the second number is for blocksize 32.
inline constexpr int64_t kMaxSmallM = 64;
inline constexpr int64_t kMaxSmallMBlock32 = 16;

// The kernels in hopper/ need K and the blocksize to be multiples of this: the columns of a K tile.
inline constexpr int64_t kHopperColumns = 64;
// The kernels in many_rows/ need K to be a multiple of this.
inline constexpr int64_t kManyRowsColumns = 64;

}  // namespace pylora::cuda
