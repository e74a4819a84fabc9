// NF4 dequantization on the GPU: w = T(code[nibble] * absmax), with a plain or a nested absmax.
//
// Shapes    weight: NF4 over [rows, cols] -> out [rows, cols] of out_dtype. The rows of `out` may
//           lie further apart, with columns between them that belong to something else.
// Numerics  The product is rounded once to fp32 and once, to nearest even, to T: bit for bit what
//           the CPU computes.
// Grid      One warp for each tile of 1024 elements, 8 warps a CTA.
// Algorithm 1. Load. A lane reads 16 bytes of qweight, which are 32 elements; a warp reads 512
//              bytes.
//           2. Lane b decodes the absmax of the tile's block b. 1024 elements are at most 32
//              blocks.
//           3. Exchange. The bytes change lanes through shared memory, so that a store of the warp
//              covers 512 bytes in a row.
//           4. Decode and store. In each step a lane takes the bytes for 16 bytes of output, gets
//              the absmax of their block from the lane that has it, decodes, and stores. The code
//              table is in shared memory; its 16 entries lie in 16 banks, so no look-up conflicts.
//              If the tile runs into a second row, the lane steps over the columns in between.
// Limits    This path needs qweight, out and the rows of out aligned to 16 bytes; if rows lie
//           apart, they must be as long as a tile. It covers whole tiles. The rest, and the whole
//           tensor if these conditions are not met, goes element by element.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/nf4.h"

namespace pylora::cuda {

// All pointers are device pointers. `offset` is null if absmax is not nested. `stride` is the
// distance of two rows of `out`, in elements. Returns the error of the launch.
cudaError_t nf4_dequantize_cuda(const NF4Matrix& weight, const float* offset, DType out_dtype,
                                int64_t stride, void* out, cudaStream_t stream);

}  // namespace pylora::cuda
