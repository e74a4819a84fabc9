// dx = grad W for few tokens, with W in NF4: the backward of nf4_linear and of the base of
// lora_linear.
//
// Shapes    grad [M, N] fp16|bf16; W NF4 over [N, K] -> dx [M, K] of grad's dtype
//           (M = tokens, N = out_features, K = in_features)
// Numerics  Codes, absmax and their products are rounded to grad's dtype. (Torch rounds only the
//           product.) absmax cannot wait for the sum, as it does in the forward: it belongs to a
//           row of W, and the sum runs over rows. It cannot multiply grad either: that would leave
//           the range of fp16. Products with grad are exact, and sums are fp32. The sums of warps
//           and of splits are added in a fixed order.
// Grid      Persistent CTAs of 8 warps, as in small_m/lora_linear.cuh. A work item is an output
//           tile, which is 256 columns of W, and a split of N. A CTA takes a range of the items,
//           split by split, so that grad stays in shared memory.
// Algorithm 1. Start the copies of qweight. A warp owns 64 columns and takes every second chunk of
//              the split, which is 32 rows. Its bytes of qweight are copied three chunks ahead,
//              across tiles too, by cp.async into the holes of the decode table
//              (nf4/nf4_decode.cuh). Its absmax is loaded as far ahead, into registers.
//           2. Fill the decode table, once a CTA. For each split, stage grad in the order in which
//              lanes read it.
//           3. Load the same word, 8 columns, of rows n and n + 4. The matrix instruction wants the
//              two rows of a column in one register, so exchange nibbles between the two words: a
//              byte is then such a pair, and one look-up decodes it.
//           4. Multiply the pair by the absmax of its two rows, and multiply with grad. The
//              m16 x k16 fragment has 16 columns of W as its rows and 16 rows of W as its columns,
//              in the order of step 2.
//           5. Add the sums of the two warps that have the same columns. A lane has 8 neighbouring
//              columns of a token, rounds them and stores 16 bytes. If N is split, it writes the
//              sums to the workspace instead; the CTA that comes last at a tile adds the sums of
//              all splits.
// Limits    M <= 64; K % blocksize == 0 and blocksize >= 64; nested_blocksize a power of two;
//           qweight aligned to 16 bytes.
// Source    QLoRA, arXiv:2305.14314; Marlin, arXiv:2408.11743, for the pipeline;
//           pylora/reference/nf4_linear.py
//
// Why the main loop is not the forward's: the two share their work range, chunks, ring, decode
// table and stored absmax (small_m/work.cuh, nf4/nf4_decode.cuh), but nothing between the wait for
// a chunk and the mma. The forward reads fragments by ldmatrix and scales sums; this kernel reads
// words, exchanges nibbles and scales weights. A loop for both would branch at each of these
// points.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/nf4.h"
#include "cuda/small_m/plan.cuh"

namespace pylora::cuda {

// All pointers are device pointers.
struct NF4LinearBackwardSmallMArgs {
  DType dtype = DType::kBFloat16;
  const void* grad = nullptr;
  void* dx = nullptr;
  int tokens = 0;
  NF4Matrix weight;
  const float* offset = nullptr;  // [1]; null if absmax is not nested

  float* partials = nullptr;     // SmallMPlan::partial_floats(M, K) of them
  unsigned* counters = nullptr;  // SmallMPlan::counters() of them, with any content
};

// Launches on `stream` and returns the first error.
cudaError_t nf4_linear_backward_small_m_cuda(const NF4LinearBackwardSmallMArgs& args,
                                             const SmallMPlan& plan, cudaStream_t stream);

}  // namespace pylora::cuda
