// y = x W^T + bias + scaling * (act(h) lora_B^T + lora_B_bias), h = dropout(x) lora_A^T +
// lora_A_bias for few tokens, W in NF4. Two kernels: lora_shrink_small_m.cu makes h; this one the rest, and
// it alone where there is no LoRA. On sm_90 and later the second starts while the first runs
// (programmatic dependent launch) and waits for it only before its first output. Tokens may have an
// adapter each, or none (lora_shrink_small_m.cuh): the low-rank part is then that of multi_lora_linear.
//
// Shapes    x [M, K] fp16|bf16; W NF4 over [N, K]; bias [N]; low = scaling * act(h) [M, R] fp32;
//           lora_B [N, R], or one for each adapter -> y [M, N] of x's dtype   (M <= 64 tokens, N =
//           out_features, K = in_features, R = rank)
// Numerics  codes rounded to x's dtype (once for all: 16 values), products exact, sums in fp32; the
//           absmax of a block multiplies the fp32 sum over that block. Sums of warps and of splits
//           are added in a fixed order: the result is the same from run to run.
// Grid      persistent CTAs of 8 warps, two an SM up to 16 tokens where they fit, else one. The
//           work is tiles of 16 or 64 rows of W times splits of K; a CTA takes a range of it, split
//           by split, so that x stays. K is is_split where its share of x would not fit shared
//           memory, and where there are fewer tiles than CTAs fit the GPU.
// Algorithm 1. A warp owns 16 rows and every n-th chunk of 128 columns of the split. Its bytes of
//              qweight are under way three chunks ahead, across tiles as well, by cp.async into the
//              holes of the decode table (nf4_decode.cuh); its absmax in registers likewise.
//           2. Every CTA fills the decode table once, and stages its split of x in the order in
//              which lanes want it: 16 bytes are the 8 columns that meet one word of qweight.
//           3. ldmatrix hands out the bytes so that a lane has the words of its two rows of the
//              m16 x k16 fragment: qweight is the m16 operand and needs no repacking, since any
//              order of k serves if x follows it. Tokens are the n8 operand.
//           4. Two bytes a row decode into one fragment; 4 mma are a block of 64.
//           5. The block's sum times its absmax, fetched from the lane that holds it.
//           6. The CTA adds its warps' sums, of 16 tokens at a time. Where K is is_split they go to
//              the workspace, and the CTA that comes last at a tile adds the splits.
//           7. + bias + low . lora_B + scaling * lora_B_bias, rounded once, stored. The tile's rows
//              of lora_B were sent for when it began.
// Limits    M <= 64, for blocks of 32 M <= 16; K % blocksize == 0; nested_blocksize a power of two;
//           lora_A and lora_B of x's dtype or fp32; x, qweight and lora_A aligned to 16 bytes.
// Source    QLoRA, arXiv:2305.14314; Punica, arXiv:2310.18547; Marlin (arXiv:2408.11743) for the
//           pipeline; pylora/reference/lora_linear.py, pylora/reference/multi_lora_linear.py
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/common/lora_args.cuh"
#include "cuda/small_m/plan.cuh"

namespace pylora::cuda {

struct LoraLinearSmallMArgs : LoraLinearArgs {
  float* partials = nullptr;     // SmallMPlan::partial_floats
  unsigned* counters = nullptr;  // SmallMPlan::counters, of any content
};

// Launches on `stream`; returns the first error.
cudaError_t lora_linear_small_m_cuda(const LoraLinearSmallMArgs& args, const SmallMPlan& plan,
                                     bool dependent_launch, cudaStream_t stream);

}  // namespace pylora::cuda
