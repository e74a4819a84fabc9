// y = x W^T + bias + scaling * (act(h) lora_B^T + lora_B_bias) for many tokens on Hopper (sm_90a),
// W in NF4, decoded into the registers from which the tensor cores take it. With LoRA another
// kernel, lora_shrink_many_rows.cu, makes low = scaling * act(h) first; this one starts while that one
// runs (programmatic dependent launch) and waits for it before it copies low.
//
// Shapes    x [M, K] fp16|bf16; W NF4 over [N, K]; bias [N]; low [M, R] fp32, rows a multiple of 4
//           apart; lora_B [N, R] -> y [M, N] of x's dtype   (M = tokens, N = out_features,
//           K = in_features, R = rank)
// Numerics  A weight is code * absmax with the code rounded to x's dtype (16 values) and the
// product
//           once more: absmax goes in as the sum of two numbers of that dtype, into a fused
//           multiply-add. Torch's dequantize rounds the product alone, to the same half unit each:
//           at most twice its error. An fp32 sum for each k_tile, times its absmax, would be more
//           exact, but takes a second set of accumulators: half the tokens a tile, and an fma for
//           each 64 products. Sums in fp32. low and lora_B are rounded to TF32, which has the
//           11 bits of fp16 and the range of fp32, and holds fp16 and bf16 exactly. The order of
//           sums is fixed: the result is the same from run to run.
// Grid      persistent CTAs, one an SM, of three warpgroups: one thread of the first feeds the
//           others, which own 64 rows of W each and share the tokens. Tiles are 128 rows by 128 or
//           256 tokens, and a CTA takes every grid-th; the rows change fastest. K is is_split where
//           there are fewer tiles than SMs.
// Algorithm 1. Fill the decode table (nf4_decode.cuh), initialize the barriers.
//           2. The feeding thread copies, a k_tile of 64 columns after the other, the tile of x
//              (swizzled by 128 bytes, as the tensor cores read their operand B) and that of
//              qweight (32 bytes a row) into a ring of stages, as soon as both warpgroups have left
//              a stage. Behind the last k_tile it copies low, 32 of the rank at a time, in its
//              place.
//           3. A thread decodes 32 weights of the k_tile, rows g and g + 8 of its warp's 16
//              (hopper_maps.cuh), into the fragments of four m64 k16 products, while those of the
//              k_tile before are under way.
//           4. It starts the four products, waits for those of the k_tile before, and gives back the
//              stage that they read.
//           5. low lora_B^T is added as more products, of TF32, with lora_B as the fragments; where
//              there are several splits of K, by the last. Then each writes its sums to the
//              workspace, and the warpgroup that comes last at its rows of a tile adds them in
//              their order.
//           6. + bias + scaling * lora_B_bias, rounded once; turned round through the holes of the
//              decode table, and stored 16 bytes at a time.
// Limits    sm_90a; K % 64 == 0; blocksize % 64 == 0 (it may straddle rows); N K < 2^35; x, qweight
//           and y aligned to 16 bytes; lora_B of x's dtype or fp32.
// Source    CUTLASS example 55 and Machete for swapped operands with a converted A in registers;
//           QLoRA, arXiv:2305.14314
//
// The columns of a k_tile keep their order, since x comes as it lies in memory: lane t of a quad
// then wants byte t of every word of qweight. It loads whole rows, 4 LDS.128 of which the quad
// shares the addresses, and its decoder picks the byte (a PRMT's selector) at no cost. The
// alternatives: x with its columns exchanged costs a pass over x; qweight reshuffled offline would
// no longer be bitsandbytes' bytes; ldmatrix hands out words and needs 8 SHFL and 16 PRMT to
// exchange them.
//
// Estimates, in issue slots of a scheduler and cycles of shared memory, for a k_tile of a tile of
// 256 tokens (1024 cycles of the tensor cores; 512 with 128 tokens). Nothing of this has run on a
// GPU.
//   decode  a warp: 16 PRMT + 16 LDS + 16 HMUL2 + 16 HFMA2 + 4 LDS.128 for 32 weights a lane; with
//           absmax, barriers and descriptors some 170 instructions a k_tile in the compiled loop
//           (benchmarks/results/kernel_resources.json), and two warps a scheduler: 340 slots. A
//           decoder by byte permutes in registers takes 78 in place of 32, at half rate.
//   memory  products read x twice: 512 cycles; copies write 288; the table 128, words 32 to 128:
//           960 to 1056 cycles, beside 576 to 672 with 128 tokens, where it is the limit.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/lora_args.cuh"
#include "cuda/hopper/plan.cuh"

namespace pylora::cuda {

// Floats from one row of low to the next: the copy engine wants a multiple of 16 bytes.
constexpr int64_t low_pitch(int64_t rank) { return ceil_div(rank, 4) * 4; }

struct LoraLinearHopperArgs : LoraLinearArgs {
  float* partials = nullptr;     // HopperPlan::partial_floats, aligned to 16 bytes
  unsigned* counters = nullptr;  // HopperPlan::counters, of any content
};

// Launches on `stream`; returns the first error. args.shrink.low has rows of low_pitch(rank).
cudaError_t lora_linear_hopper_cuda(const LoraLinearHopperArgs& args, const HopperPlan& plan,
                                    cudaStream_t stream);

}  // namespace pylora::cuda
