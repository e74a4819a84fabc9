// NF4 dequantization on the CPU: w = T(code[nibble] * absmax).
//
// Shapes    weight: NF4 over [rows, cols], plain or nested absmax -> out [rows * cols] of out_dtype
// Numerics  one fp32 rounding for the product, one to nearest even for T; bit for bit bitsandbytes.
// Method    a block has one absmax and thus only 16 different values: they are computed and rounded
//           once a block, and each nibble then selects one (a byte or word permute where there is
//           one).
// Threads   one range of whole blocks each; the result does not depend on their number.
#pragma once

#include <cstdint>

#include "common/nf4.h"

namespace pylora::cpu {

void nf4_dequantize(const NF4Matrix& weight, DType out_dtype, void* out);

// Whole blocks [begin, end), for one instruction set each.
using DequantizeBlocks = void(const NF4Matrix& weight, DType out_dtype, int64_t begin, int64_t end,
                              void* out);

DequantizeBlocks nf4_dequantize_blocks_portable;
DequantizeBlocks nf4_dequantize_blocks_avx2;
DequantizeBlocks nf4_dequantize_blocks_avx512;

}  // namespace pylora::cpu
