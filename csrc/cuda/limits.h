// What the kernels of this folder cannot do at all. Python's planners read these numbers from
// build_info(), of every build: no CUDA header is included here.
#pragma once

#include <cstdint>

namespace pylora::cuda {

// The kernels for few tokens, in small_m/.
inline constexpr int64_t kMaxSmallM = 64;
inline constexpr int64_t kMaxSmallMBlock32 = 16;
inline constexpr int64_t kMaxRank = 1024;
inline constexpr int64_t kMaxElements = int64_t{1} << 35;  // blocks are counted in 32 bits

// The kernels for many tokens, in many_rows/ and hopper/.
inline constexpr int64_t kMaxM = 8 * 65535;      // of a grid
inline constexpr int64_t kHopperColumns = 64;    // K and the blocksize are multiples of it
inline constexpr int64_t kManyRowsColumns = 64;  // K is a multiple of it

inline constexpr int64_t kAlignment = 16;  // bytes, of what is read 16 at a time

}  // namespace pylora::cuda
