// What the bind files of this folder share.
#pragma once

#include "common/tensors.h"

namespace pylora::cpu {

// A checked NF4 weight; the CPU can read its offset at once.
inline NF4Matrix to_matrix(NF4Tensors& weight, int64_t rows, int64_t cols) {
  NF4Arguments arguments = weight.check(rows, cols);
  if (arguments.offset != nullptr) arguments.matrix.offset = *arguments.offset;
  return arguments.matrix;
}

}  // namespace pylora::cpu
