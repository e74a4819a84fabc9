// LayerNorm (arXiv:1607.06450) and RMSNorm (arXiv:1910.07467) of single rows, forward and backward,
// as templates over the vector primitives.
//
//   standardized = (x - mean) * factor       RMSNorm takes 0 for the mean
//   y = standardized * weight + bias
//   dx = factor * (d - mean(d) - standardized * mean(d * standardized)),  d = dy * weight
//                                            RMSNorm leaves mean(d) out
//
// Numerics  Means are sums of short chains in fp32, which are added up in fp64. Everything else is
//           fp32.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/float16.h"
#include "common/nf4.h"

namespace pylora::cpu {

// The values are the codes by which the ops name a kind; pylora/backends/extension.py has the same.
enum class NormKind { kNone, kLayerNorm, kRmsNorm };
inline constexpr const char* kNormNames[] = {"none", "layer_norm", "rms_norm"};

struct Norm {
  NormKind kind = NormKind::kNone;
  const float* weight = nullptr;  // [columns]
  const float* bias = nullptr;    // [columns], or null
  double eps = 0.0;

  PYLORA_INLINE bool enabled() const { return kind != NormKind::kNone; }
};

// What a norm computes of each row before it writes the row.
struct RowStatistics {
  float mean;
  float factor;
};

// So many vectors are added in fp32, and then to a sum in fp64.
inline constexpr int64_t kRowChain = 8;

// Loads a vector of a row that has `left` elements from p on; `fill` follows the last one.
template <class S, class T>
PYLORA_INLINE typename S::F load_row(const T* p, int64_t left, float fill = 0.0f) {
  if (left >= S::kLanes) return S::load(p);
  float values[S::kLanes];
  for (int64_t i = 0; i < S::kLanes; ++i) values[i] = i < left ? to_float(p[i]) : fill;
  return S::load(values);
}

template <class S, class T>
PYLORA_INLINE void store_row(T* p, typename S::F v, int64_t left) {
  if (left >= S::kLanes) {
    S::store(p, v);
  } else {
    S::store_n(p, v, static_cast<int>(left));
  }
}

// The mean of a row of `count` values; vector(i) has those from i on, and zeros behind the last.
template <class S, class Vector>
PYLORA_INLINE double row_mean(int64_t count, const Vector& vector) {
  double total = 0.0;
  for (int64_t i = 0; i < count;) {
    typename S::F chain = S::zero();
    for (int64_t k = 0; k < kRowChain && i < count; ++k, i += S::kLanes) {
      chain = S::add(chain, vector(i));
    }
    total += S::sum(chain);
  }
  return total / static_cast<double>(count);
}

template <class S, class T>
RowStatistics row_statistics(const Norm& norm, const T* x, int64_t count) {
  float mean = 0.0f;
  if (norm.kind == NormKind::kLayerNorm) {
    mean = static_cast<float>(
        row_mean<S>(count, [&](int64_t i) { return load_row<S>(x + i, count - i); }));
  }
  const typename S::F shift = S::set1(-mean);
  const double square = row_mean<S>(count, [&](int64_t i) {
    const typename S::F centered = S::add(load_row<S>(x + i, count - i, mean), shift);
    return S::mul(centered, centered);
  });
  return {mean, static_cast<float>(1.0 / std::sqrt(square + norm.eps))};
}

// The standardized values of a row from x on; zeros follow the last one.
template <class S, class T>
PYLORA_INLINE typename S::F standardized(const RowStatistics& row, const T* x, int64_t left) {
  const typename S::F centered = S::add(load_row<S>(x, left, row.mean), S::set1(-row.mean));
  return S::mul(centered, S::set1(row.factor));
}

// out = norm(x), which may be x itself.
template <class S, class T, class Out>
void normalize_row(const Norm& norm, const RowStatistics& row, const T* x, int64_t count,
                   Out* out) {
  for (int64_t i = 0; i < count; i += S::kLanes) {
    const int64_t left = count - i;
    const typename S::F bias = norm.bias != nullptr ? load_row<S>(norm.bias + i, left) : S::zero();
    store_row<S>(
        out + i,
        S::fma(standardized<S>(row, x + i, left), load_row<S>(norm.weight + i, left), bias), left);
  }
}

// out = dx for the gradient `grad` of norm(x); it may be x or grad itself. Unless `sums` is null,
// this row's parts of the gradients of weight and bias are added to sums [2][count].
template <class S, class T, class Grad>
void norm_backward_row(const Norm& norm, const RowStatistics& row, const T* x, const Grad* grad,
                       int64_t count, float* out, float* sums) {
  using F = typename S::F;
  double total = 0.0, along = 0.0;  // the sums of d and of d * standardized
  for (int64_t i = 0; i < count;) {
    F chain = S::zero(), chain_along = S::zero();
    for (int64_t k = 0; k < kRowChain && i < count; ++k, i += S::kLanes) {
      const int64_t left = count - i;
      const F g = load_row<S>(grad + i, left), values = standardized<S>(row, x + i, left);
      const F d = S::mul(g, load_row<S>(norm.weight + i, left));
      chain = S::add(chain, d);
      chain_along = S::fma(d, values, chain_along);
      if (sums == nullptr) continue;
      float* bias_sums = sums + count + i;
      store_row<S>(sums + i, S::fma(g, values, load_row<S>(sums + i, left)), left);
      store_row<S>(bias_sums, S::add(g, load_row<S>(bias_sums, left)), left);
    }
    total += S::sum(chain);
    along += S::sum(chain_along);
  }
  if (norm.kind == NormKind::kRmsNorm) total = 0.0;
  const F shift = S::set1(static_cast<float>(-total / static_cast<double>(count)));
  const F slope = S::set1(static_cast<float>(-along / static_cast<double>(count)));
  const F factor = S::set1(row.factor);
  for (int64_t i = 0; i < count; i += S::kLanes) {
    const int64_t left = count - i;
    const F d = S::mul(load_row<S>(grad + i, left), load_row<S>(norm.weight + i, left));
    const F along_row = S::fma(standardized<S>(row, x + i, left), slope, S::add(d, shift));
    store_row<S>(out + i, S::mul(along_row, factor), left);
  }
}

// out = row + add, rounded once; `add` may be null.
template <class S, class T>
void write_row(const float* row, const T* add, int64_t count, T* out) {
  for (int64_t i = 0; i < count; i += S::kLanes) {
    const int64_t left = count - i;
    typename S::F sum = load_row<S>(row + i, left);
    if (add != nullptr) sum = S::add(sum, load_row<S>(add + i, left));
    store_row<S>(out + i, sum, left);
  }
}

}  // namespace pylora::cpu
