// The kernel of dropout.h, as a template over the vector primitives.
#pragma once

#include "cpu/dropout.h"
#include "cpu/gemm_pack.h"
#include "cpu/parallel.h"

namespace pylora::cpu {

inline constexpr int64_t kDropStretch = 2048;  // elements that a thread holds in fp32
inline constexpr int64_t kDropGrain = 8;       // a thread is woken for at least so many stretches

template <class S, class T>
void drop_elements_as(const DropoutArgs& args) {
  const T* x = static_cast<const T*>(args.x);
  T* y = static_cast<T*>(args.y);
  const int64_t stretches = ceil_div(args.count, kDropStretch);
  parallel_for(0, stretches, kDropGrain, [&](int64_t begin, int64_t end) {
    float values[kDropStretch];
    for (int64_t first = begin * kDropStretch; first < end * kDropStretch && first < args.count;
         first += kDropStretch) {
      const int64_t left = args.count - first;
      const int64_t count = left < kDropStretch ? left : kDropStretch;
      widen_row<S>(x + first, count, values);
      drop_values<S>(args.dropout, first, count, values);
      int64_t i = 0;
      for (; i + S::kLanes <= count; i += S::kLanes) S::store(y + first + i, S::load(values + i));
      for (; i < count; ++i) y[first + i] = from_float<T>(values[i]);
    }
  });
}

template <class S>
void drop_elements_on(const DropoutArgs& args) {
  visit_dtype(args.dtype, [&](auto element) { drop_elements_as<S, decltype(element)>(args); });
}

}  // namespace pylora::cpu
