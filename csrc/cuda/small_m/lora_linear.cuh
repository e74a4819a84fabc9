// y = x W^T + bias + scaling * (act(h) lora_B^T + lora_B_bias), h = dropout(x) lora_A^T +
// lora_A_bias for few tokens, W in NF4. Two kernels: lora_hidden.cu makes h; this one the rest, and
// it alone where there is no LoRA. On sm_90 and later the second starts while the first runs
// (programmatic dependent launch) and waits for it only before its first output. Tokens may have an
// adapter each, or none (lora_hidden.cuh): the low-rank part is then that of multi_lora_linear.
//
// Shapes    x [M, K] fp16|bf16; W NF4 over [N, K]; bias [N]; low = scaling * act(h) [M, R] fp32;
//           lora_B [N, R], or one for each adapter -> y [M, N] of x's dtype   (M <= 64 tokens, N =
//           out_features, K = in_features, R = rank)
// Numerics  codes rounded to x's dtype (once for all: 16 values), products exact, sums in fp32; the
//           absmax of a block multiplies the fp32 sum over that block. Sums of warps and of slices
//           are added in a fixed order: the result is the same from run to run.
// Grid      persistent CTAs of 8 warps, two an SM up to 16 tokens where they fit, else one. The
//           work is tiles of 16 or 64 rows of W times slices of K; a CTA takes a range of it, slice
//           by slice, so that x stays. K is sliced where its share of x would not fit shared
//           memory, and where there are fewer tiles than CTAs fit the GPU.
// Algorithm 1. A warp owns 16 rows and every n-th chunk of 128 columns of the slice. Its bytes of
//              qweight are under way three chunks ahead, across tiles as well, by cp.async into the
//              holes of the decode table (nf4_pairs.cuh); its absmax in registers likewise.
//           2. Every CTA fills the decode table once, and stages its slice of x in the order in
//              which lanes want it: 16 bytes are the 8 columns that meet one word of qweight.
//           3. ldmatrix hands out the bytes so that a lane has the words of its two rows of the
//              m16 x k16 fragment: qweight is the m16 operand and needs no repacking, since any
//              order of k serves if x follows it. Tokens are the n8 operand.
//           4. Two bytes a row decode into one fragment; 4 mma are a block of 64.
//           5. The block's sum times its absmax, fetched from the lane that holds it.
//           6. The CTA adds its warps' sums, of 16 tokens at a time. Where K is sliced they go to
//              the workspace, and the CTA that comes last at a tile adds the slices.
//           7. + bias + low . lora_B + scaling * lora_B_bias, rounded once, stored. The tile's rows
//              of lora_B were sent for when it began.
// Limits    M <= 64, for blocks of 32 M <= 16; K % blocksize == 0; nested_blocksize a power of two;
//           lora_A and lora_B of x's dtype or fp32; x, qweight and lora_A aligned to 16 bytes.
// Source    QLoRA, arXiv:2305.14314; Punica, arXiv:2310.18547; Marlin (arXiv:2408.11743) for the
//           pipeline; pylora/reference/lora_linear.py, pylora/reference/multi_lora_linear.py
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/nf4.h"
#include "cuda/limits.h"
#include "cuda/small_m/lora_shrink.cuh"

namespace pylora::cuda {

struct DeviceLimits {
  int processors = 0;             // SMs
  int64_t shared_per_sm = 0;      // bytes
  int64_t shared_per_cta = 0;     // bytes, the most a kernel may ask for
  int major = 0, minor = 0;       // compute capability
  bool dependent_launch = false;  // sm_90 on
};

// Of the current device, which is asked once.
cudaError_t device_limits(DeviceLimits* limits);

// How the work is cut: outputs (N) into tiles, the sum (K) into slices; the backward sums over N.
// The thresholds are estimates: nothing of this has run on a GPU.
struct SmallPlan {
  int output_warps = 1;  // warps of a CTA with outputs of their own
  int sum_warps = 1;     // that share outputs, and take every n-th chunk of the sum
  int tiles = 0;         // of the outputs of a CTA
  int slices = 1;        // of the sum
  int slice_chunks = 0;  // chunks a slice; the last slice may have fewer
  int pitch = 0;         // of tokens in the staged x, or grad
  int steps = 0;         // of a warp through a slice: slice_chunks / sum_warps, rounded up
  int grid = 0;
  int64_t shared_bytes = 0;

  int64_t partial_floats(int64_t tokens, int64_t outputs) const {
    return slices > 1 ? slices * tokens * outputs : 0;
  }
  int64_t counters() const { return slices > 1 ? tiles : 0; }
};

SmallPlan plan_small(int64_t tokens, int64_t rows, int64_t cols, const DeviceLimits& limits);

// What a caller who measures other plans than the rule's decides; the rest of a plan follows.
struct SmallChoice {
  int64_t output_warps = 0, slices = 0, grid = 0;
};

// Makes the chosen plan and returns null, or returns why the kernel cannot run it.
const char* choose_small(const SmallChoice& choice, int64_t tokens, int64_t rows, int64_t cols,
                         const DeviceLimits& limits, SmallPlan* plan);

// A vector of any dtype, or nothing.
struct Vector {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// One call; pointers are of the device.
struct LoraLinear {
  DType dtype = DType::kBFloat16;
  const void* x = nullptr;
  void* y = nullptr;
  int tokens = 0;
  NF4Matrix weight;
  const float* offset = nullptr;  // [1], null where absmax is not nested
  Vector bias;

  LoraHidden hidden;             // rank 0: no LoRA
  const void* lora_B = nullptr;  // [N, R], or [adapters, N, R]
  Vector lora_B_bias;
};

struct LoraLinearSmall : LoraLinear {
  float* partials = nullptr;     // SmallPlan::partial_floats
  unsigned* counters = nullptr;  // SmallPlan::counters, of any content
};

// Launches on `stream`; returns the first error.
cudaError_t lora_linear_small_cuda(const LoraLinearSmall& op, const SmallPlan& plan,
                                   bool dependent_launch, cudaStream_t stream);

}  // namespace pylora::cuda
