// NF4 dequantization on the GPU: w = T(code[nibble] * absmax), plain or nested absmax.
//
// Shapes    weight: NF4 over [rows, cols], pointers on the device -> out [rows * cols] of out_dtype
// Numerics  one fp32 rounding for the product, one to nearest even for T; bit for bit the CPU's.
// Grid      one warp a tile of 1024 elements, 8 warps a CTA.
// Algorithm 1. A lane reads 16 bytes of qweight: 32 elements, 512 bytes a warp.
//           2. Lane b decodes absmax of the tile's block b: 1024 elements are at most 32 blocks.
//           3. The bytes change lanes through shared memory, so that a store covers 512 bytes in a
//           row.
//           4. Each step a lane takes its bytes for 16 bytes of output, fetches the absmax of their
//              block from the lane that has it, decodes from the table in shared memory (16 entries
//              in 16 banks: free of conflicts whatever the nibbles are), and stores 16 bytes.
// Limits    the path above wants qweight and out aligned to 16 bytes and covers whole tiles; the
// rest,
//           and everything where the alignment is missing, goes element by element.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/nf4.h"

namespace pylora {

// `offset` is a device pointer, null where absmax is not nested. Returns the launch's error.
cudaError_t nf4_dequantize_cuda(const NF4Matrix& weight, const float* offset, DType out_dtype,
                                void* out, cudaStream_t stream);

}  // namespace pylora
