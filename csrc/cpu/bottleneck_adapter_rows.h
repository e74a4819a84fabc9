// The norms and the dropout of a bottleneck adapter (bottleneck_adapter.h) for a block of tokens, as
// templates over the vector primitives. They work on rows of the full width, between the products.
#pragma once

#include "cpu/bottleneck_adapter.h"
#include "cpu/gemm_pack.h"
#include "cpu/norm_rows.h"
#include "cpu/philox.h"

namespace pylora::cpu {

// Matrices [tokens][hidden] of a block, for an adapter with norms or dropout. Each is null if the
// call needs none.
template <class TW>
struct BlockRows {
  float* z;  // later the gradient of n
  TW* n;
  TW* dz;
};

// Which of them a call needs, and where the memory of a range of blocks has them.
template <class TW>
struct BlockRowsLayout {
  int64_t elements;  // of a matrix
  bool z, n, dz;

  PYLORA_INLINE int64_t wide() const { return z ? round_up(elements, kAlign) : 0; }
  PYLORA_INLINE int64_t narrow(bool needed) const {
    constexpr int64_t kShare = sizeof(float) / sizeof(TW);
    return needed ? round_up(ceil_div(elements, kShare), kAlign) : 0;
  }
  PYLORA_INLINE int64_t floats() const { return wide() + narrow(n) + narrow(dz); }
  PYLORA_INLINE BlockRows<TW> at(float* memory) const {
    float* behind_z = memory + wide();
    return {z ? memory : nullptr, n ? reinterpret_cast<TW*>(behind_z) : nullptr,
            dz ? reinterpret_cast<TW*>(behind_z + narrow(n)) : nullptr};
  }

 private:
  static constexpr int64_t kAlign = 16;  // floats in a cache line
};

// n = norm_before(x) for the tokens of a block.
template <class S, class T, class TW>
void normalize_rows(const Norm& norm, const T* x, int64_t tokens, int64_t hidden,
                    RowStatistics* statistics, TW* n) {
  for (int64_t m = 0; m < tokens; ++m, x += hidden, n += hidden) {
    statistics[m] = row_statistics<S>(norm, x, hidden);
    normalize_row<S>(norm, statistics[m], x, hidden, n);
  }
}

// y of a block from z before its bias and dropout, which is overwritten. `residual` may be null.
template <class S, class T>
void write_y(const BottleneckArgs& args, int64_t first, int64_t tokens, float* z, const T* residual,
             T* y) {
  const int64_t hidden = args.hidden;
  for (int64_t m = 0; m < tokens; ++m, z += hidden, y += hidden) {
    if (args.up_bias != nullptr) write_row<S>(z, args.up_bias, hidden, z);
    if (args.dropout.enabled) drop_values<S>(args.dropout, (first + m) * hidden, hidden, z);
    if (args.norm_after.enabled()) {
      normalize_row<S>(args.norm_after, row_statistics<S>(args.norm_after, z, hidden), z, hidden,
                       z);
    }
    write_row<S>(z, residual != nullptr ? residual + m * hidden : nullptr, hidden, y);
  }
}

// The part of a norm's sums that a token belongs to. Its first token makes it zero.
template <class S>
float* sums_of(float* parts, int64_t token, int64_t hidden) {
  if (parts == nullptr) return nullptr;
  float* part = parts + token / kSumTokens * 2 * hidden;
  if (token % kSumTokens == 0) {
    for (int64_t i = 0; i < 2 * hidden; ++i) part[i] = 0.0f;
  }
  return part;
}

// dz of a block from the gradient of y, for an adapter with norm_after or dropout. With norm_after,
// `z` is given before its bias and dropout. It is overwritten.
template <class S, class T, class TW>
void write_dz(const BottleneckArgs& args, int64_t first, int64_t tokens, float* z, const T* grad,
              float* parts, TW* dz) {
  const int64_t hidden = args.hidden;
  const Norm& norm = args.norm_after;
  for (int64_t m = 0; m < tokens; ++m, z += hidden, grad += hidden, dz += hidden) {
    const int64_t place = (first + m) * hidden;
    if (norm.enabled()) {
      if (args.up_bias != nullptr) write_row<S>(z, args.up_bias, hidden, z);
      if (args.dropout.enabled) drop_values<S>(args.dropout, place, hidden, z);
      norm_backward_row<S>(norm, row_statistics<S>(norm, z, hidden), z, grad, hidden, z,
                           sums_of<S>(parts, first + m, hidden));
    } else {
      widen_row<S>(grad, hidden, z);
    }
    if (args.dropout.enabled) drop_values<S>(args.dropout, place, hidden, z);
    write_row<S>(z, static_cast<const TW*>(nullptr), hidden, dz);
  }
}

// dx of a block, unless args.dx is null, from the gradient of n, which is overwritten.
template <class S, class T>
void write_dx(const BottleneckArgs& args, int64_t first, int64_t tokens,
              const RowStatistics* statistics, float* dn, float* parts) {
  const int64_t hidden = args.hidden;
  for (int64_t m = 0; m < tokens; ++m, dn += hidden) {
    const int64_t place = (first + m) * hidden;
    norm_backward_row<S>(args.norm_before, statistics[m], static_cast<const T*>(args.x) + place, dn,
                         hidden, dn, sums_of<S>(parts, first + m, hidden));
    if (args.dx == nullptr) continue;
    write_row<S>(dn, args.adds_x ? static_cast<const T*>(args.grad) + place : nullptr, hidden,
                 static_cast<T*>(args.dx) + place);
  }
}

}  // namespace pylora::cpu
