// y = x W^T + bias + scaling * (act(h) lora_B^T + lora_B_bias) for many tokens on Hopper (sm_90a),
// with W in NF4: the forward of lora_linear and, without LoRA, of nf4_linear. W is decoded into the
// registers from which the tensor cores take it. With LoRA, many_rows/lora_shrink.cu makes
// low = scaling * act(h) first; this kernel starts while that one runs (programmatic dependent
// launch), and waits for it before it copies low.
//
// Shapes    x [M, K] fp16|bf16; W NF4 over [N, K]; bias [N]; low [M, R] fp32, whose rows are a
//           multiple of 4 floats apart; lora_B [N, R] -> y [M, N] of x's dtype
//           (M = tokens, N = out_features, K = in_features, R = rank)
// Numerics  A weight is code * absmax. The code is rounded to x's dtype (16 values), absmax is
//           split into a sum of two numbers of that dtype, and a fused multiply-add rounds their
//           product with the code once more. Torch's dequantize rounds only the product, to the
//           same half unit, so the error is at most twice torch's. (An fp32 sum for each NF4 block,
//           multiplied by its absmax, would be more exact. It would need a second set of
//           accumulators, hence tiles with half the tokens, and an FMA for each 64 products.)
//           Sums are fp32. low and lora_B are rounded to TF32, which has the 11 bits of fp16 and
//           the range of fp32, and holds fp16 and bf16 exactly. Sums have a fixed order: the result
//           is the same from run to run.
// Grid      Persistent CTAs, one on each SM, with three warpgroups. One thread of the first, the
//           producer, feeds the two others, the consumers, which own 64 rows of W each and share
//           the tokens. An output tile is 128 rows by 128 or 256 tokens. CTA i takes the tiles i,
//           i + grid, ...; the rows change fastest. If there are fewer tiles than SMs, K is cut
//           into splits.
// Algorithm 1. Fill the decode table (nf4/nf4_decode.cuh) and initialize the barriers.
//           2. The producer goes over K in K tiles of 64 columns. For each it copies the tile of x
//              (swizzled by 128 bytes, as the tensor cores read their operand B) and the tile of
//              qweight (32 bytes a row) into a ring of stages. It refills a stage as soon as both
//              consumers have left it. After the last K tile it copies low in the place of x, 32
//              columns of the rank at a time.
//           3. A consumer thread decodes 32 weights of the K tile, from rows g and g + 8 of its
//              warp's 16 (hopper/maps.cuh), into the fragments of four m64 k16 products. The
//              products of the K tile before run meanwhile.
//           4. It starts the four products, waits for those of the K tile before, and leaves the
//              stage that they read.
//           5. It adds low lora_B^T by more products, in TF32, with lora_B as the fragments. If K
//              is split, the last split does this.
//           6. If K is split, each consumer writes its sums to the workspace. The consumer that
//              comes last at its rows of the tile adds the sums of all splits, in their order.
//           7. It adds bias + scaling * lora_B_bias and rounds once. The outputs change threads
//              through the holes of the decode table, and are stored 16 bytes at a time.
// Limits    sm_90a; K % 64 == 0; blocksize % 64 == 0 (a block may straddle rows); N K < 2^35; x,
//           qweight and y aligned to 16 bytes; lora_B of x's dtype or fp32.
// Source    CUTLASS example 55 and Machete, for swapped operands with a converted A in registers;
//           QLoRA, arXiv:2305.14314
//
// Why rows are loaded whole: x comes as it lies in memory, so the columns of a K tile keep their
// order, and lane t of a quad wants byte t of every word of qweight. Each lane loads whole rows by
// 4 LDS.128, whose addresses the quad shares, and the decoder picks the byte by a PRMT selector, at
// no cost. The alternatives cost more: exchanging the columns of x takes a pass over x; reordering
// qweight offline would give up bitsandbytes' bytes; ldmatrix hands out words, which 8 SHFL and 16
// PRMT would have to exchange.
//
// What a K tile costs an SM, in cycles, by benchmarks/resources/cycle_model.py from the compiled
// code (benchmarks/results/kernel_resources.json). The model is an estimate: this kernel has not
// been timed on a GPU.
//   tile        issue slots   shared memory   tensor cores
//   128 tokens    331 - 334             688            512     shared memory binds
//   256 tokens          349            1072           1024     shared memory binds
// Decoding 32 weights takes a lane 16 PRMT + 16 LDS + 16 HMUL2 + 16 HFMA2 + 4 LDS.128.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/lora_args.cuh"
#include "cuda/hopper/plan.cuh"

namespace pylora::cuda {

// The distance of two rows of low, in floats: the copy engine wants a multiple of 16 bytes.
constexpr int64_t low_pitch(int64_t rank) { return ceil_div(rank, 4) * 4; }

struct LoraLinearHopperArgs : LoraLinearArgs {
  float* partials = nullptr;     // HopperPlan::partial_floats() of them, aligned to 16 bytes
  unsigned* counters = nullptr;  // HopperPlan::counters() of them, with any content
};

// Launches on `stream` and returns the first error. The rows of args.shrink.low are low_pitch(rank)
// floats apart.
cudaError_t lora_linear_hopper_cuda(const LoraLinearHopperArgs& args, const HopperPlan& plan,
                                    cudaStream_t stream);

}  // namespace pylora::cuda
