// NF4 quantization on the GPU, bit for bit the CPU's and bitsandbytes' (csrc/cpu/nf4_quantize.h).
//
// Shapes    weight [numel] fp32|fp16|bf16, finite -> qweight [ceil(numel / 2)],
//           absmax [ceil(numel / blocksize)] fp32
// Numerics  absmax = max |x|; s = x * (1 / max(absmax, 1e-38)), two fp32 roundings, denormals kept;
//           the code is the number of midpoints below s, so ties go down. A short last block
//           divides x by the clamped absmax instead, and stores the clamped one.
// Grid      a CTA of 4 warps takes a tile of 4096 elements, the largest block; a warp 1024 of them.
// Algorithm 1. Each step a lane reads 16 bytes: a load of the warp covers 512 bytes in a row, and
//              the whole tile stays in registers.
//           2. The lanes that share a group of 32 elements take its largest magnitude by shuffles;
//              the tile has 128 groups, one for each thread.
//           3. Thread i reduces group i with its neighbours of the same block: within the warp by
//              shuffles, beyond it (blocks of 2048 and 4096) through shared memory. It keeps
//              1 / absmax for its group; the first thread of a block stores absmax.
//           4. Scale, find the codes, pack. A code is one step away from a table: |s| <= 1 falls
//              into one of 31 cells no wider than the gap between two midpoints, so a cell has at
//              most one of them to compare with.
//           5. The bytes change lanes through shared memory, so that a lane stores 16 of them.
// Limits    the path above wants weight and qweight aligned to 16 bytes and covers whole tiles; the
//           rest, and everything where the alignment is missing, goes with one warp a block.
// Source    QLoRA, arXiv:2305.14314; bitsandbytes 0.50, backends/default/ops.py
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/nf4.h"

namespace pylora::cuda {

// Device pointers. Returns the launch's error.
cudaError_t nf4_quantize_cuda(const void* weight, DType dtype, int64_t numel, int64_t blocksize,
                              uint8_t* qweight, float* absmax, cudaStream_t stream);

}  // namespace pylora::cuda
