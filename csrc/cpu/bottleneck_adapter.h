// A bottleneck adapter, forward and backward (Houlsby et al., arXiv:1902.00751).
//
//   forward    h = x @ down^T + down_bias;   low = scaling * act(h)
//              y = residual + low @ up^T + scaling * up_bias
//   backward   dh = (scaling * g @ up) * act'(h), where h is computed again from x
//              dx = dh @ down, plus g if x was the residual
//              ddown = dh^T x;  dup = g^T low;  the gradients of the biases are column sums
//
// Shapes    x, residual, g [M, K]; h, low, dh [M, R]; down [R, K]; up [K, R]
//           (M = tokens, K = hidden, R = bottleneck)
// Numerics  Sums are fp32, and so is everything of width R, whatever the dtypes of x and weights,
//           with one exception: where the processor has bf16 products and both are bf16, low and dh
//           are rounded to bf16 for the products that they enter, as torch rounds them.
// Passes    The forward reads x once from memory and writes y once: a block of tokens stays in the
//           caches between its two products. The backward reads x and g once for dx and
//           dh, and once more for the gradients of the weights.
// Memory    Beside its outputs a call needs the weights once more as packed fp32 panels (the calling
//           thread keeps up to kKeptBytes of them for its next call), the backward low and dh as
//           well, and each thread a fixed workspace.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "cpu/nf4_linear.h"

namespace pylora::cpu {

inline constexpr int64_t kMaxBottleneck = 1024;

struct BottleneckArgs {
  const void* x = nullptr;
  DType dtype = DType::kFloat32;  // that of x, the residual, g, y and dx
  int64_t tokens = 0;
  int64_t hidden = 0;
  int64_t size = 0;  // of the bottleneck
  const void* down = nullptr;
  const void* up = nullptr;
  DType weight_dtype = DType::kFloat32;
  const float* down_bias = nullptr;  // null without a bias
  const float* up_bias = nullptr;    // null without a bias; times the scaling
  float scaling = 1.0f;
  Activation activation = Activation::kRelu;

  // The forward alone.
  const void* residual = nullptr;  // null without a residual
  void* y = nullptr;

  // The backward alone. An output is null if it was not requested.
  const void* grad = nullptr;
  bool adds_x = true;
  void* dx = nullptr;
  void* ddown = nullptr;
  void* dup = nullptr;
  float* ddown_bias = nullptr;  // [R]
  float* grad_sums = nullptr;   // [K], the column sums of g
};

// Computes y, or low and dh (each [M, R], or null) and dx.
using AdapterForward = void(const BottleneckArgs& args);
using AdapterBackward = void(const BottleneckArgs& args, float* low, float* dh);

AdapterForward adapter_forward_portable, adapter_forward_avx2, adapter_forward_avx512;
AdapterBackward adapter_backward_portable, adapter_backward_avx2, adapter_backward_avx512;
// Those with bf16 products take only bf16.
AdapterForward adapter_forward_avx512_bf16, adapter_forward_amx, adapter_forward_amx_emulated;
AdapterBackward adapter_backward_avx512_bf16, adapter_backward_amx, adapter_backward_amx_emulated;

void bottleneck_adapter(const BottleneckArgs& args);
void bottleneck_adapter_backward(const BottleneckArgs& args);

}  // namespace pylora::cpu
