// Makes the descriptions that the copy engine of sm_90 reads matrices by. The driver's encoder is
// asked for at run time: the extension links to no driver, and imports where there is none.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/nf4.h"
#include "cuda/hopper/ptx.cuh"

namespace pylora::cuda {

// A row-major matrix in global memory, and the tile of it that one copy brings; a tile's rows are
// as long as its swizzle.
struct TiledMatrix {
  const void* data = nullptr;  // aligned to 16 bytes
  int item_bytes = 1;          // 1, 2 (moved as they are) or 4
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t pitch = 0;  // bytes from one row to the next, a multiple of 16
  int tile_rows = 0;  // at most 256
  Swizzle swizzle = Swizzle::k128;
};

cudaError_t encode_tensor_map(const TiledMatrix& matrix, TensorMap* map);

}  // namespace pylora::cuda
