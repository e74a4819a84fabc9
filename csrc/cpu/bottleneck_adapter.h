// A bottleneck adapter, forward and backward (Houlsby et al., arXiv:1902.00751).
//
//   forward    n = norm_before(x)
//              h = n @ down^T + down_bias;   low = scaling * act(h)
//              z = dropout(low @ up^T + scaling * up_bias)
//              y = residual + norm_after(z)
//   backward   dz = mask / (1 - p) * norm_after'(g), where n, h and z are computed again from x
//              dh = (scaling * dz @ up) * act'(h)
//              dx = norm_before'(dh @ down), plus g if x was the residual
//              ddown = dh^T n;  dup = dz^T low;  the gradients of the biases are column sums
//
// Shapes    x, residual, g, n, z, dz [M, K]; h, low, dh [M, R]; down [R, K]; up [K, R]
//           (M = tokens, K = hidden, R = bottleneck)
// Numerics  Sums are fp32, and so is everything of width R, whatever the dtypes of x and weights,
//           with one exception: where the processor has bf16 products and both are bf16, low and dh
//           are rounded to bf16 for the products that they enter, as torch rounds them. Norms are
//           fp32 (norm_rows.h). The n of a norm, and a dz that is not g itself, are rounded to the
//           dtype of the weights, as torch rounds them.
// Passes    The forward reads x once from memory and writes y once: a block of tokens stays in the
//           caches between its two products. The backward reads x and g once for dx and
//           dh, and once more for the gradients of the weights.
// Memory    Beside its outputs a call needs the weights once more as packed fp32 panels, and with
//           norms or dropout up to three matrices of a block of tokens for each thread (the calling
//           thread keeps up to kKeptBytes of both for its next call). The backward needs low and
//           dh as well; n with norm_before, if the gradient of down is wanted; dz with norm_after,
//           if that of up or up_bias is wanted; and for the gradients of each norm two vectors of K
//           for every kSumTokens tokens. Each thread needs a fixed workspace.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/nf4.h"
#include "cpu/norm_rows.h"
#include "cpu/philox.h"

namespace pylora::cpu {

inline constexpr int64_t kMaxBottleneck = 1024;
// The gradients of a norm are summed over so many tokens, and these sums are then added in order.
// Blocks of tokens consist of whole such parts, so that the number of threads changes no sum.
inline constexpr int64_t kSumTokens = 16;

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
  Norm norm_before, norm_after;
  Dropout dropout;  // of z

  // The forward alone.
  const void* residual = nullptr;  // null without a residual
  void* y = nullptr;

  // The backward alone. An output is null if it was not requested.
  const void* grad = nullptr;
  bool adds_x = true;
  void* dx = nullptr;
  void* ddown = nullptr;
  void* dup = nullptr;
  float* ddown_bias = nullptr;   // [R]
  float* dz_sums = nullptr;      // [K], the column sums of dz
  float* before_sums = nullptr;  // [2][K], the gradients of norm_before's weight and bias
  float* after_sums = nullptr;   // [2][K], the same of norm_after

  PYLORA_INLINE bool changes_z() const { return norm_after.enabled() || dropout.enabled; }
};

// What the first pass of a backward leaves for the second. Each is null if nobody needs it.
struct BackwardBuffers {
  float* low = nullptr;           // [M, R]
  float* dh = nullptr;            // [M, R]
  void* n = nullptr;              // [M, K], of the weights' dtype, with norm_before
  void* dz = nullptr;             // [M, K], of the weights' dtype, with norm_after
  float* before_parts = nullptr;  // [M / kSumTokens][2][K], parts of before_sums
  float* after_parts = nullptr;   // the same of after_sums
};

// Computes y, or dx and what is to be left in the buffers.
using AdapterForward = void(const BottleneckArgs& args);
using AdapterBackward = void(const BottleneckArgs& args, const BackwardBuffers& buffers);

AdapterForward adapter_forward_portable, adapter_forward_avx2, adapter_forward_avx512;
AdapterBackward adapter_backward_portable, adapter_backward_avx2, adapter_backward_avx512;
// Those with bf16 products take only bf16.
AdapterForward adapter_forward_avx512_bf16, adapter_forward_amx, adapter_forward_amx_emulated;
AdapterBackward adapter_backward_avx512_bf16, adapter_backward_amx, adapter_backward_amx_emulated;

void bottleneck_adapter(const BottleneckArgs& args);
void bottleneck_adapter_backward(const BottleneckArgs& args);

}  // namespace pylora::cpu
