// NF4 quantization on the CPU, bit for bit what bitsandbytes writes.
//
// Shapes    weight [n] fp32|fp16|bf16, finite -> qweight [ceil(n / 2)],
//           absmax [ceil(n / blocksize)] fp32
// Numerics  absmax = max |x|; s = x * (1 / max(absmax, 1e-38)) with two fp32 roundings; the code is
//           the number of midpoints below s, so a tie goes down. A short last block divides x by
//           the clamped absmax instead, and stores the clamped one, as bitsandbytes does.
// Threads   Each thread takes a range of whole blocks. The result does not depend on their number.
// Source    QLoRA, arXiv:2305.14314; bitsandbytes 0.50, backends/default/ops.py
#pragma once

#include <cstdint>

#include "common/nf4.h"

namespace pylora::cpu {

void nf4_quantize(const void* weight, DType dtype, int64_t numel, int64_t blocksize,
                  uint8_t* qweight, float* absmax);

// Quantizes the whole blocks [begin, end). There is one such function for each instruction set.
using QuantizeBlocks = void(const void* weight, DType dtype, int64_t begin, int64_t end,
                            int64_t blocksize, uint8_t* qweight, float* absmax);

QuantizeBlocks nf4_quantize_blocks_portable;
QuantizeBlocks nf4_quantize_blocks_avx2;
QuantizeBlocks nf4_quantize_blocks_avx512;

}  // namespace pylora::cpu
