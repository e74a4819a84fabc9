// NF4 dequantization on the GPU: w = T(code[nibble] * absmax), plain or nested absmax.
//
// Shapes    weight: NF4 over [rows, cols], pointers on the device -> out [rows, cols] of out_dtype,
//           whose rows may lie further apart, with columns beside them that are another's
// Numerics  one fp32 rounding for the product, one to nearest even for T; bit for bit the CPU's.
// Grid      one warp a tile of 1024 elements, 8 warps a CTA.
// Algorithm 1. A lane reads 16 bytes of qweight: 32 elements, 512 bytes a warp.
//           2. Lane b decodes absmax of the tile's block b: 1024 elements are at most 32 blocks.
//           3. The bytes change lanes through shared memory, so that a store of the warp covers
//              512 bytes in a row.
//           4. Each step a lane takes its bytes for 16 bytes of output, fetches the absmax of their
//              block from the lane that has it, decodes from the table in shared memory (16 entries
//              in 16 banks: free of conflicts whatever the nibbles are), and stores 16 bytes.
//              Where the tile's second row begins, it steps over the columns in between.
// Limits    the path above wants qweight, out and the rows of out aligned to 16 bytes, rows of a
//           tile or more where they lie apart, and covers whole tiles; the rest, and everything
//           that is not so, goes element by element.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/nf4.h"

namespace pylora::cuda {

// `offset` is a device pointer, null where absmax is not nested; `stride` counts the elements from
// one row of `out` to the next. Returns the launch's error.
cudaError_t nf4_dequantize_cuda(const NF4Matrix& weight, const float* offset, DType out_dtype,
                                int64_t stride, void* out, cudaStream_t stream);

}  // namespace pylora::cuda
