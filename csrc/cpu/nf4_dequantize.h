// NF4 dequantization on the CPU: w = T(code[nibble] * absmax).
//
// Shapes    weight: NF4 over [rows, cols], plain or nested absmax -> out [rows * cols] of out_dtype
// Numerics  The product is rounded once to fp32 and once, to nearest even, to T: bit for bit what
//           bitsandbytes computes.
// Method    A block has one absmax, and so only 16 different values. They are computed and rounded
//           once a block; each nibble then selects one of them, by a byte or word permute if the
//           instruction set has one.
// Threads   Each thread takes a range of whole blocks. The result does not depend on their number.
#pragma once

#include <cstdint>

#include "common/nf4.h"

namespace pylora::cpu {

void nf4_dequantize(const NF4Matrix& weight, DType out_dtype, void* out);

// Decodes a panel of a weight whose rows are whole blocks: rows [row, row + rows) of its columns
// [col, col + cols), which begin and end with a block, to the rows of out [rows, cols].
void nf4_dequantize_panel(const NF4Matrix& weight, int64_t row, int64_t rows, int64_t col,
                          int64_t cols, DType out_dtype, void* out);

// Decodes the whole blocks [begin, end); the first of them goes to `out`, and the others follow it.
// There is one such function for each instruction set.
using DequantizeBlocks = void(const NF4Matrix& weight, DType out_dtype, int64_t begin, int64_t end,
                              void* out);

DequantizeBlocks nf4_dequantize_blocks_portable;
DequantizeBlocks nf4_dequantize_blocks_avx2;
DequantizeBlocks nf4_dequantize_blocks_avx512;

}  // namespace pylora::cpu
