// y = x W^T + bias + scaling * (act(h) lora_B^T + lora_B_bias) for few tokens, with W in NF4 and
// h = dropout(x) lora_A^T + lora_A_bias. This is the forward of three ops: lora_linear; nf4_linear,
// which has no LoRA (rank 0); and multi_lora_linear, in which each token has an adapter of its own,
// or none. With LoRA, small_m/lora_shrink.cu makes h and low = scaling * act(h) first. On sm_90 and
// later, this kernel starts while that one runs (programmatic dependent launch), and waits for it
// only before its first output.
//
// Shapes    x [M, K] fp16|bf16; W NF4 over [N, K]; bias [N]; low [M, R] fp32; lora_B [N, R], or
//           [adapters, N, R] -> y [M, N] of x's dtype
//           (M = tokens, N = out_features, K = in_features, R = rank)
// Numerics  The 16 codes are rounded to x's dtype. Their products with x are exact, and sums are
//           fp32. The absmax of a block multiplies the fp32 sum over that block. The sums of warps
//           and of splits are added in a fixed order: the result is the same from run to run.
// Grid      Persistent CTAs of 8 warps. Up to 16 tokens an SM has two of them if they fit, else
//           one. A work item is an output tile, which is 16 or 64 rows of W, and a split of K. A
//           CTA takes a range of the items, split by split, so that x stays in shared memory. K is
//           split if x would not fit there, or if there are fewer tiles than CTAs.
// Algorithm 1. Start the copies of qweight. A warp owns 16 rows and takes every n-th chunk of the
//              split, which is 128 columns. Its bytes of qweight are copied three chunks ahead,
//              across tiles too, by cp.async into the holes of the decode table
//              (nf4/nf4_decode.cuh). Its absmax is loaded as far ahead, into registers.
//           2. Fill the decode table, once a CTA. For each split, stage x in the order in which
//              lanes read it: 16 bytes are the 8 columns that meet one word of qweight.
//           3. Load qweight by ldmatrix, so that a lane gets the words of its two rows of the
//              m16 x k16 fragment. qweight is the m16 operand, and needs no reordering, since any
//              order of k serves if x has the same. Tokens are the n8 operand.
//           4. Decode two bytes a row into one fragment, and multiply. Four mma cover 64 columns.
//           5. Multiply the sum over the block by its absmax, which another lane may hold.
//           6. Add the sums of the CTA's warps, for 16 tokens at a time. If K is split, write them
//              to the workspace; the CTA that comes last at a tile adds the sums of all splits.
//           7. Add bias + low . lora_B + scaling * lora_B_bias, round once, store. The tile's rows
//              of lora_B were prefetched when the tile began.
// Limits    M <= 64, and M <= 16 if blocksize is 32; K % blocksize == 0; nested_blocksize a power
//           of two; lora_A and lora_B of x's dtype or fp32; x, qweight and lora_A aligned to 16
//           bytes.
// Source    QLoRA, arXiv:2305.14314; Punica, arXiv:2310.18547; Marlin, arXiv:2408.11743, for the
//           pipeline; pylora/reference/lora_linear.py, pylora/reference/multi_lora_linear.py
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/lora_args.cuh"
#include "cuda/small_m/plan.cuh"

namespace pylora::cuda {

struct LoraLinearSmallMArgs : LoraLinearArgs {
  float* partials = nullptr;     // SmallMPlan::partial_floats() of them
  unsigned* counters = nullptr;  // SmallMPlan::counters() of them, with any content
};

// Launches on `stream` and returns the first error. `dependent_launch` says that the GPU has
// programmatic dependent launch.
cudaError_t lora_linear_small_m_cuda(const LoraLinearSmallMArgs& args, const SmallMPlan& plan,
                                     bool dependent_launch, cudaStream_t stream);

}  // namespace pylora::cuda
