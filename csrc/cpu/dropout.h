// Dropout of a tensor whose products torch computes: y = mask / (1 - p) * x (philox.h).
//
// Shapes    x, y [count], any number of dimensions flattened
// Numerics  The product is fp32, and is rounded once.
#pragma once

#include <cstdint>

#include "common/nf4.h"
#include "cpu/philox.h"

namespace pylora::cpu {

struct DropoutArgs {
  const void* x = nullptr;
  void* y = nullptr;
  DType dtype = DType::kFloat32;  // of both
  int64_t count = 0;
  Dropout dropout;
};

using DropElements = void(const DropoutArgs& args);
DropElements drop_elements_portable, drop_elements_avx2, drop_elements_avx512;

void drop_elements(const DropoutArgs& args);

}  // namespace pylora::cpu
