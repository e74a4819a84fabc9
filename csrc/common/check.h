// Checks of op arguments. They run before any memory is touched, and each error names the argument,
// what it must be and what it was. Here are only the checks that memory safety needs; pylora makes
// the others in Python.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <string>

#include "common/nf4.h"

namespace pylora {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Sizes>
inline std::string to_string(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return text + "]";
}

inline DType to_dtype(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(type));
  }
}

// Torch accepts None for a tensor that a schema requires, and passes an undefined tensor.
inline void check_given(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.defined(), name, " must be a tensor, got None");
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType expected) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, name, " must have dtype ",
                  torch::headeronly::toString(expected), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& like,
                         const char* like_name) {
  const auto device = tensor.device();
  const auto expected = like.device();
  STD_TORCH_CHECK(device == expected, name, " must be on the device of ", like_name, " (type ",
                  static_cast<int>(expected.type()), ", index ", expected.index(), "), got (type ",
                  static_cast<int>(device.type()), ", index ", device.index(), ")");
}

// The parts of `why` say, in the error, where the expected number comes from.
template <class... Why>
inline void check_numel(const char* name, const Tensor& tensor, int64_t expected,
                        const Why&... why) {
  STD_TORCH_CHECK(tensor.numel() == expected, name, " must have ", expected, " elements (", why...,
                  "), got ", tensor.numel(), " in shape ", to_string(tensor.sizes()));
}

template <size_t kDims>
inline void check_shape(const char* name, const Tensor& tensor, const int64_t (&sizes)[kDims]) {
  bool same = tensor.dim() == int64_t{kDims};
  for (size_t i = 0; same && i < kDims; ++i) {
    same = tensor.size(static_cast<int64_t>(i)) == sizes[i];
  }
  STD_TORCH_CHECK(same, name, " must have shape ", to_string(sizes), ", got ",
                  to_string(tensor.sizes()));
}

inline void check_dim(const char* name, const Tensor& tensor, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, got shape ",
                  to_string(tensor.sizes()));
}

inline void check_blocksize(int64_t blocksize) {
  STD_TORCH_CHECK(is_nf4_blocksize(blocksize),
                  "blocksize must be 32, 64, 128, 256, 512, 1024, 2048 or 4096, got ", blocksize);
}

// The number of elements of a shape that may come from a caller. Raises if a size is negative or
// the product would overflow.
template <class Sizes>
inline int64_t checked_numel(const char* name, const Sizes& sizes) {
  int64_t numel = 1;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size >= 0, name, " must have no negative size, got ", to_string(sizes));
    STD_TORCH_CHECK(size == 0 || numel <= std::numeric_limits<int64_t>::max() / 8 / size, name,
                    " must have fewer than 2^60 elements, got ", to_string(sizes));
    numel *= size;
  }
  return numel;
}

}  // namespace pylora
