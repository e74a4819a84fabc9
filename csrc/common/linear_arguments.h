// Checks of the arguments that the linear ops have beside the NF4 weight.
#pragma once

#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <string>

#include "common/activation.h"
#include "common/check.h"

namespace pylora {

inline void check_matrix(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, got shape ",
                  to_string(tensor.sizes()));
  check_contiguous(name, tensor);
}

inline void check_matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t cols) {
  check_matrix(name, tensor);
  STD_TORCH_CHECK(tensor.size(0) == rows && tensor.size(1) == cols, name, " must have shape [",
                  rows, ", ", cols, "], got ", to_string(tensor.sizes()));
}

// A matrix for each adapter.
inline void check_stack(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 3, name, " must have 3 dimensions, got shape ",
                  to_string(tensor.sizes()));
  check_contiguous(name, tensor);
}

inline void check_stack(const char* name, const Tensor& tensor, int64_t count, int64_t rows,
                        int64_t cols) {
  check_stack(name, tensor);
  STD_TORCH_CHECK(tensor.size(0) == count && tensor.size(1) == rows && tensor.size(2) == cols, name,
                  " must have shape [", count, ", ", rows, ", ", cols, "], got ",
                  to_string(tensor.sizes()));
}

inline void check_vector(const char* name, const Tensor& tensor, int64_t size) {
  check_contiguous(name, tensor);
  check_numel(name, tensor, size, "one for every output");
}

// The string itself, as it comes: torch's own conversion to std::string leaks a copy of it in every
// call (up to 2.13 at least). It is freed here.
inline Activation to_activation(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  const std::string name(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  static constexpr const char* kNames[] = {"identity", "relu", "gelu",   "gelu_tanh",
                                           "silu",     "tanh", "sigmoid"};
  for (int i = 0; i < 7; ++i) {
    if (name == kNames[i]) return static_cast<Activation>(i);
  }
  STD_TORCH_CHECK(false,
                  "activation must be identity, relu, gelu, gelu_tanh, silu, tanh or sigmoid, got ",
                  name);
}

// Elements whose 32-bit word is below this are dropped.
inline uint32_t drop_threshold(double p) {
  const double threshold = p * 4294967296.0 + 0.5;
  return threshold < 4294967295.0 ? static_cast<uint32_t>(threshold) : 4294967295u;
}

// The seed where there is dropout, else null.
inline const Tensor* check_dropout(double p, const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout_p must be in [0, 1), got ", p);
  if (p == 0.0) return nullptr;
  STD_TORCH_CHECK(seed.has_value(), "seed must be given where dropout_p is not 0, got none");
  check_dtype("seed", *seed, ScalarType::Long);
  check_numel("seed", *seed, 1, "a scalar");
  return &*seed;
}

}  // namespace pylora
