// NF4 quantization on the GPU, bit for bit what the CPU (csrc/cpu/nf4_quantize.h) and bitsandbytes
// compute.
//
// Shapes    weight [numel] fp32|fp16|bf16, finite -> qweight [ceil(numel / 2)],
//           absmax [ceil(numel / blocksize)] fp32
// Numerics  absmax = max |x|; s = x * (1 / max(absmax, 1e-38)) with two fp32 roundings, denormals
//           kept; the code is the number of midpoints below s, so a tie goes down. A short last
//           block divides x by the clamped absmax instead, and stores the clamped one.
// Grid      A CTA of 4 warps takes a tile of 4096 elements, which is the largest block. Each warp
//           takes 1024 of them.
// Algorithm 1. Load. Each step a lane reads 16 bytes: a load of the warp covers 512 bytes in a row,
//              and the whole tile stays in registers.
//           2. Reduce groups. The lanes that share a group of 32 elements find its largest
//              magnitude by shuffles. The tile has 128 groups, one for each thread.
//           3. Reduce blocks. Thread i reduces group i with the other groups of its block: by
//              shuffles within the warp, and through shared memory beyond it (blocks of 2048 and
//              4096). It keeps 1 / absmax for its group; the first thread of a block stores absmax.
//           4. Scale, find the codes, pack. One look-up in a table of cells finds a code: |s| <= 1
//              falls into one of 31 cells that are no wider than the gap between two midpoints, so
//              a cell has at most one midpoint to compare with.
//           5. Store. The bytes change lanes through shared memory, so that a lane stores 16 bytes.
// Limits    This path needs weight and qweight aligned to 16 bytes, and covers whole tiles. One
//           warp a block takes the rest, and the whole tensor if it is not aligned.
// Source    QLoRA, arXiv:2305.14314; bitsandbytes 0.50, backends/default/ops.py
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/nf4.h"

namespace pylora::cuda {

// All pointers are device pointers. Returns the error of the launch.
cudaError_t nf4_quantize_cuda(const void* weight, DType dtype, int64_t numel, int64_t blocksize,
                              uint8_t* qweight, float* absmax, cudaStream_t stream);

}  // namespace pylora::cuda
