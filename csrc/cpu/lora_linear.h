// LoRA over an NF4 linear layer, forward and backward (Hu et al., arXiv:2106.09685).
//
//   forward    h = dropout(x) @ lora_A^T + lora_A_bias;   low = scaling * act(h)
//              y = x @ W^T + bias + low @ lora_B^T + scaling * lora_B_bias
//   backward   dh = (scaling * g @ lora_B) * act'(h)
//              dx = g @ W + mask / (1 - p) * (dh @ lora_A)
//              dlora_B = g^T low;  dlora_A = dh^T dropout(x)
//              the gradients of the biases are column sums
//
// Shapes    x [M, K]; g [M, N]; h, low, dh [M, R] fp32; lora_A [R, K]; lora_B [N, R]
// Numerics  Everything of rank R is fp32, whatever the dtypes of x and of the adapter are, with one
//           exception: where the processor has bf16 products and both are bf16, low and dh are
//           rounded to bf16 for the products that they enter, and so is dropout(x), as torch rounds
//           them. Calls of few tokens round less.
// Passes    The forward reads x twice (for h, then for y); the backward reads g three times and x
//           once.
// Memory    Beside its outputs a call needs low and dh, which are as large as h, and a fixed
//           workspace for each thread. The gradients in bf16 products need low, and then dh, once
//           more in bf16, padded to whole tiles (PackedLow).
#pragma once

#include <cstdint>
#include <memory>

#include "common/activation.h"
#include "cpu/dense_linear.h"
#include "cpu/nf4_linear.h"
#include "cpu/philox.h"

namespace pylora::cpu {

inline constexpr int64_t kMaxRank = 1024;

// Activations or their gradient [M, cols]; `dropout` is applied as they are read.
struct TokenMatrix {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t tokens = 0;
  int64_t cols = 0;
  Dropout dropout;
  const int64_t* rows = nullptr;  // the row of each token in data; null if token m has row m

  PYLORA_INLINE int64_t row(int64_t token) const { return rows == nullptr ? token : rows[token]; }
};

// A factor of the adapter, or its gradient: lora_A [rank, cols] (rank_first) or lora_B [cols,
// rank].
struct AdapterFactor {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rank = 0;
  bool rank_first = true;
};

// out [M, rank] = x @ factor, plus bias [rank] unless that is null.
using Project = void(const TokenMatrix& x, const AdapterFactor& factor, const float* bias,
                     float* out);
// gradient = low^T x, and sums [cols] = the column sums of x. A result is skipped if its pointer is
// null. low [M, rank] must be readable for kLowPadding floats beyond its end.
using Gather = void(const TokenMatrix& x, const float* low, const AdapterFactor& gradient,
                    float* sums);
inline constexpr int64_t kLowPadding = 32;

// `count` floats that are not initialized, and kLowPadding zeros behind them.
std::unique_ptr<float[]> low_rank_buffer(int64_t count);
// sums [cols] = the column sums of values [rows, cols], added up in fp64.
void column_sums(const float* values, int64_t rows, int64_t cols, float* sums);

Project project_portable, project_avx2, project_avx512;
Gather gather_portable, gather_avx2, gather_avx512;
// Those with bf16 products take only bf16, and round dropout(x) and low to it.
Project project_avx512_bf16, project_amx, project_amx_emulated;
Gather gather_avx512_bf16, gather_amx, gather_amx_emulated;
// The kernels of the instruction set in use and of these dtypes.
Project project;
Gather* gather_for(DType tokens, DType factor);

struct LoraLinearArgs {
  NF4LinearArgs linear;  // backward: x is the gradient, y is dx, or null
  TokenMatrix x;
  AdapterFactor lora_A, lora_B;
  float scaling = 1.0f;
  Activation activation = Activation::kIdentity;
  float* h = nullptr;  // forward: written; backward: read
  const float* lora_A_bias = nullptr;

  // The outputs of the backward. Each is null if it was not requested.
  void* dlora_A = nullptr;
  void* dlora_B = nullptr;
  float* dlora_A_bias = nullptr;  // [rank]
  float* grad_sums = nullptr;     // [N], the column sums of the gradient
};

void lora_linear(const LoraLinearArgs& args);
// The same over a dense weight; `linear` has everything but the low-rank term, and args.linear is not
// read.
void lora_linear_dense(const LoraLinearArgs& args, DenseLinearArgs linear);
void lora_linear_backward(const LoraLinearArgs& args);

}  // namespace pylora::cpu
