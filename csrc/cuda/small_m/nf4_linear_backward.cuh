// dx = grad W for few tokens, W in NF4.
//
// Shapes    grad [M, N] fp16|bf16; W NF4 over [N, K] -> dx [M, K] of grad's dtype
//           (M <= 64 tokens, N = out_features, K = in_features)
// Numerics  codes, absmax and their products rounded to grad's dtype (torch rounds the product
//           alone): absmax belongs to a row of W, over which the sum goes, so that it cannot wait
//           for the sum; and grad * absmax would leave the range of fp16. Products with grad exact,
//           sums in fp32, those of warps and of splits in a fixed order.
// Grid      persistent CTAs of 8 warps, as in lora_linear.cuh with the roles of N and K changed.
//           The work is tiles of 256 columns of W times splits of N; a CTA takes a range of it,
//           split by split, so that grad stays.
// Algorithm 1. A warp owns 64 columns and every second chunk of 32 rows of the split. Its bytes of
//              qweight are under way three chunks ahead, across tiles as well, by cp.async into the
//              holes of the decode table (nf4_decode.cuh); its absmax in registers likewise.
//           2. Every CTA fills the decode table once, and stages its split of grad in the order in
//              which lanes want it.
//           3. A lane takes the same word, 8 columns, of rows n and n + 4. The matrix instruction
//              wants the two rows of one column beside each other: the nibbles are exchanged before
//              they are decoded, then a byte is such a pair and one lookup gives both weights.
//           4. The pair times the absmax of its rows: the m16 x k16 fragment has 16 columns of W as
//              its rows, and 16 rows of W as its columns, in the order that step 2 knows.
//           5. The two warps of the same columns add their sums. A lane has 8 columns of a token,
//              one after the other: it stores them rounded, 16 bytes. Where N is is_split they go to
//              the workspace, and the CTA that comes last at a tile adds the splits.
// Limits    M <= 64; K % blocksize == 0 and blocksize >= 64; nested_blocksize a power of two;
//           qweight aligned to 16 bytes.
// Source    QLoRA, arXiv:2305.14314; Marlin (arXiv:2408.11743) for the pipeline;
//           pylora/reference/nf4_linear.py
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/nf4.h"
#include "cuda/small_m/plan.cuh"

namespace pylora::cuda {

struct NF4LinearBackwardSmallMArgs {
  DType dtype = DType::kBFloat16;
  const void* grad = nullptr;
  void* dx = nullptr;
  int tokens = 0;
  NF4Matrix weight;               // device pointers
  const float* offset = nullptr;  // [1], null where absmax is not nested

  float* partials = nullptr;     // SmallMPlan::partial_floats of the columns
  unsigned* counters = nullptr;  // SmallMPlan::counters, of any content
};

// Launches on `stream`; returns the first error.
cudaError_t nf4_linear_backward_small_m_cuda(const NF4LinearBackwardSmallMArgs& args,
                                             const SmallMPlan& plan, cudaStream_t stream);

}  // namespace pylora::cuda
