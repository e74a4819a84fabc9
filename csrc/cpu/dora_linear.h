// The rescaling of DoRA, which follows lora_linear, and its part of the backward.
//
//   forward    y = product * factors + bias                  factors = magnitude / norm
//   backward   dproduct = grad * factors;   dfactors = the column sums of grad * product
//
// Shapes    product, grad, y, dproduct [M, N]; factors, bias, dfactors [N] fp32
// Numerics  Products are fp32, and are rounded once. Column sums run in fp32 for kRescaleChain rows
//           at a time, and these are added in fp64.
// Threads   Threads share out the columns, so that their number changes no sum.
#pragma once

#include <cstdint>

#include "common/nf4.h"

namespace pylora::cpu {

struct RescaleArgs {
  const void* values = nullptr;   // [tokens, cols], the product, or in the backward the gradient
  void* out = nullptr;            // [tokens, cols], which may be `values`
  DType dtype = DType::kFloat32;  // of values, out and product
  int64_t tokens = 0;
  int64_t cols = 0;
  const float* factors = nullptr;  // [cols]
  const float* bias = nullptr;     // [cols], or null
  const void* product = nullptr;   // [tokens, cols], for the sums
  float* sums = nullptr;           // [cols], the column sums of values * product, or null
};

using Rescale = void(const RescaleArgs& args);
Rescale dora_rescale_portable, dora_rescale_avx2, dora_rescale_avx512;

void dora_rescale(const RescaleArgs& args);

}  // namespace pylora::cpu
