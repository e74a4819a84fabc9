// y = x @ W^T for a few tokens and a dense weight W [out_features, in_features], with a low-rank
// term: y = x @ W^T + bias + low @ adapter^T.
//
// Shapes    x [M, K], M <= kMaxDenseM; W [N, K] in x's dtype; y [M, N]; low [M, R] fp32, already
//           scaled; adapter [N, R]   (M = tokens, N = out_features, K = in_features, R = rank)
// Numerics  Sums are fp32, in chains of kDenseChain vectors. If x and W are bf16 and the processor
//           has bf16 products, pairs of bf16 are multiplied; otherwise both are widened to fp32.
// Method    W is read once, a few rows at a time; torch's own product packs it in each call.
// Threads   Threads share out the rows of W. The order of each sum depends on K alone.
#pragma once

#include <cstdint>

#include "common/nf4.h"
#include "cpu/small_m_rows.h"

namespace pylora::cpu {

// More tokens do not fit the first-level cache beside W, and then torch's product is faster.
inline constexpr int64_t kMaxDenseM = 4;

struct DenseMatrix {
  const void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
};

struct DenseLinearArgs {
  const void* x = nullptr;
  void* y = nullptr;
  DType dtype = DType::kFloat32;  // of x, W and y
  int64_t tokens = 0;
  DenseMatrix weight;
  const float* bias = nullptr;    // [N], the sum of all biases, or null
  const float* low = nullptr;     // [M, rank], or null
  const void* adapter = nullptr;  // of `adapter_dtype`
  DType adapter_dtype = DType::kFloat32;
  int64_t rank = 0;
};

using RunDense = void(const DenseLinearArgs& args);
RunDense dense_linear_portable, dense_linear_avx2, dense_linear_avx512;
RunDense dense_linear_avx512_bf16;  // takes only bf16

void dense_linear(const DenseLinearArgs& args);

}  // namespace pylora::cpu
