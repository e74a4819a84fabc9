// The LoRA adapters of a batch in which each token has one of n adapters or none, forward and
// backward (Punica: Chen et al., arXiv:2310.18547). The base layer has run before: y and dx hold its
// results, and the adapters are added to them.
//
//   forward    h[m] = x[m] @ A[i]^T;   y[m] += scalings[i] * h[m] @ B[i]^T       i = ids[m]
//   backward   dh[m] = scalings[i] * g[m] @ B[i];   dx[m] += dh[m] @ A[i]
//              dA[i] = dh^T x;   dB[i] = g^T (scalings[i] * h)    over the tokens of adapter i
//
// Shapes    x, dx [M, K]; g, y [M, N]; h, dh [M, R]; A [n, R, K]; B [n, N, R]; ids [M]
//           (M = tokens, N = out_features, K = in_features, R = rank, n = adapters)
// Numerics  as lora_linear.h, but y and dx were rounded before the adapters are added in fp32.
// Groups    The tokens of an adapter are a group. Everything of rank R is kept in the order of the
//           groups; x, g, y and dx are read and written where they lie. A token in no group is not
//           touched, and no value of a group enters another one.
// Threads   A sum runs over the values of one token, or over the tokens of one adapter; its order
//           does not depend on the number of threads.
// Memory    Beside its outputs a call needs up to three matrices as large as h, and a fixed
//           workspace for each thread.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/lora_linear.h"

namespace pylora::cpu {

// The tokens of one adapter: as many as `count`, from place `first` on in the order of the groups.
struct AdapterGroup {
  int64_t adapter = 0;
  int64_t first = 0;
  int64_t count = 0;
};

// Rows of activations or of their gradient, to which products of rank R are added.
struct LowRankSum {
  void* out = nullptr;  // [M, cols]
  DType dtype = DType::kFloat32;
  int64_t cols = 0;
  const int64_t* rows = nullptr;  // the row of out of each token, in the order of the groups
  std::span<const AdapterGroup> groups;
  // For each group [rank, count], readable for kLowPadding floats beyond the end.
  const float* low = nullptr;
  AdapterFactor factor;  // that of adapter 0, which those of the others follow
};

// out[rows[m]] += low[:, m] @ factor, for all tokens m of all groups
using AddLowRank = void(const LowRankSum& sum);
AddLowRank add_low_rank_portable, add_low_rank_avx2, add_low_rank_avx512;

struct MultiLoraArgs {
  TokenMatrix x;
  int64_t out_features = 0;
  const int64_t* ids = nullptr;     // [M]; an id outside [0, adapters) stands for no adapter
  const float* scalings = nullptr;  // [adapters]
  int64_t adapters = 0;
  AdapterFactor lora_A, lora_B;  // those of adapter 0, which those of the others follow
  float* h = nullptr;            // forward: written, zeros for a token without an adapter
  void* y = nullptr;             // the forward alone, of x's dtype

  // The backward alone. An output is null if it was not requested.
  const void* grad = nullptr;  // of x's dtype
  void* dx = nullptr;
  void* dlora_A = nullptr;
  void* dlora_B = nullptr;
};

void multi_lora_linear(const MultiLoraArgs& args);
void multi_lora_linear_backward(const MultiLoraArgs& args);

}  // namespace pylora::cpu
