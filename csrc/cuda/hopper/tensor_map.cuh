// Makes the tensor maps, by which the copy engine (TMA) of sm_90 reads matrices. The driver's
// encoder is looked up at run time: the extension links to no driver, and can be imported without
// one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/nf4.h"
#include "cuda/hopper/ptx.cuh"

namespace pylora::cuda {

// A row-major matrix in global memory, and the tile of it that one copy brings. A row of the tile
// has as many bytes as the swizzle.
struct TiledMatrix {
  const void* data = nullptr;  // aligned to 16 bytes
  int item_bytes = 1;          // 1 (uint8), 2 (fp16 or bf16, moved as uint16) or 4 (fp32)
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t pitch = 0;  // bytes from one row to the next, a multiple of 16
  int tile_rows = 0;  // at most 256
  Swizzle swizzle = Swizzle::k128;
};

cudaError_t encode_tensor_map(const TiledMatrix& matrix, TensorMap* map);

}  // namespace pylora::cuda
