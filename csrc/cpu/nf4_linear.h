// y = x @ W^T and dx = g @ W for an NF4 weight W [out_features, in_features], with a low-rank term.
//
// Shapes    forward:  x [M, K] -> y [M, N] = x @ W^T + bias + low @ adapter^T,   adapter [N, R]
//           backward: x [M, N] -> y [M, K] = x @ W + factor * (low @ adapter),   adapter [R, K]
//           low [M, R] fp32, already scaled; factor is dropout's 0 or 1 / (1 - p)
//           (M = tokens, N = out_features, K = in_features, R = rank)
// Numerics  Sums are fp32. If x is bf16 and the processor has bf16 products, W is rounded to bf16,
//           as a dequantized weight is; otherwise W and x are fp32. The low-rank term is fp32,
//           with one exception: where x is multiplied in bf16 and the adapter is bf16, low is rounded
//           to bf16, as torch rounds it.
// Method    If M <= kMaxSmallM, nf4_linear_small_m.h decodes the weight in registers. Otherwise
//           nf4_linear_impl.h packs a batch of tokens, decodes one panel of W after the other into
//           the cache, and multiplies.
// Threads   Threads share out the outputs. The order of each sum depends on M alone.
// Memory    At most 2 MiB a thread.
#pragma once

#include <cstdint>

#include "common/nf4.h"
#include "cpu/philox.h"
#include "cpu/small_m_rows.h"

namespace pylora::cpu {

inline constexpr int64_t kMaxSmallM = 8;

struct NF4LinearArgs {
  const void* x = nullptr;  // [M, depth], of `dtype`
  void* y = nullptr;        // [M, width], of `dtype`
  DType dtype = DType::kFloat32;
  int64_t tokens = 0;  // M
  NF4Matrix weight;
  bool backward = false;
  const float* bias = nullptr;    // [width], the sum of all biases, or null
  const float* low = nullptr;     // [M, rank], or null
  const void* adapter = nullptr;  // of `adapter_dtype`
  DType adapter_dtype = DType::kFloat32;
  int64_t rank = 0;
  Dropout dropout;  // in the backward, applied to the low-rank term

  PYLORA_INLINE int64_t depth() const { return backward ? weight.rows : weight.cols; }
  PYLORA_INLINE int64_t width() const { return backward ? weight.cols : weight.rows; }
};

// There is one set of kernels for each instruction set. Those with bf16 products take only bf16.
using RunLinear = void(const NF4LinearArgs& args);
RunLinear run_linear_portable;
RunLinear run_linear_avx2;
RunLinear run_linear_avx512;
RunLinear run_linear_avx512_bf16;
RunLinear run_linear_amx;
RunLinear run_linear_amx_emulated;

void run_linear(const NF4LinearArgs& args);  // runs the set that cpu_isa() names

}  // namespace pylora::cpu
