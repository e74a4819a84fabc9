// Checks of op arguments, for the bind files: they run before any memory is touched, and each error
// names the argument, what it must be and what it was.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
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

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType expected) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, name, " must have dtype ",
                  torch::headeronly::toString(expected), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_contiguous(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous, got strides ",
                  to_string(tensor.strides()), " for shape ", to_string(tensor.sizes()));
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& like,
                         const char* like_name) {
  const auto device = tensor.device();
  const auto expected = like.device();
  STD_TORCH_CHECK(device == expected, name, " must be on the device of ", like_name, " (type ",
                  static_cast<int>(expected.type()), ", index ", expected.index(), "), got (type ",
                  static_cast<int>(device.type()), ", index ", device.index(), ")");
}

inline void check_numel(const char* name, const Tensor& tensor, int64_t expected,
                        const std::string& why) {
  STD_TORCH_CHECK(tensor.numel() == expected, name, " must have ", expected, " elements (", why,
                  "), got ", tensor.numel(), " in shape ", to_string(tensor.sizes()));
}

inline void check_blocksize(int64_t blocksize) {
  STD_TORCH_CHECK(is_nf4_blocksize(blocksize),
                  "blocksize must be 32, 64, 128, 256, 512, 1024, 2048 or 4096, got ", blocksize);
}

// The product of a shape whose sizes may come from a caller; neither negative nor beyond int64.
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

// The NF4 arguments of an op, checked, as pointers. `offset` points to where the value lies, which
// may be another device's memory; the CPU's bind code reads it into the matrix.
struct NF4Arguments {
  NF4Matrix matrix;
  const float* offset = nullptr;
};

inline NF4Arguments check_nf4(const Tensor& qweight, const Tensor& absmax,
                              const std::optional<Tensor>& nested_absmax,
                              const std::optional<Tensor>& nested_code,
                              const std::optional<Tensor>& offset, int64_t blocksize,
                              int64_t nested_blocksize, int64_t rows, int64_t cols) {
  check_blocksize(blocksize);
  const int64_t sizes[] = {rows, cols};
  const int64_t numel = checked_numel("shape", sizes);
  const int64_t blocks = ceil_div(numel, blocksize);
  check_dtype("qweight", qweight, ScalarType::Byte);
  check_contiguous("qweight", qweight);
  check_numel("qweight", qweight, ceil_div(numel, 2),
              "two of the weight's " + std::to_string(numel) + " elements a byte");

  const bool nested = nested_absmax.has_value();
  STD_TORCH_CHECK(
      nested_code.has_value() == nested && offset.has_value() == nested,
      "nested_absmax, nested_code and offset must be given together or not at all, got ",
      nested ? "" : "no ", "nested_absmax, ", nested_code.has_value() ? "" : "no ",
      "nested_code and ", offset.has_value() ? "" : "no ", "offset");
  check_dtype("absmax", absmax, nested ? ScalarType::Byte : ScalarType::Float);
  check_contiguous("absmax", absmax);
  check_device("absmax", absmax, qweight, "qweight");
  check_numel(
      "absmax", absmax, blocks,
      "one for every " + std::to_string(blocksize) + " of " + std::to_string(numel) + " elements");

  NF4Arguments arguments;
  NF4Matrix& matrix = arguments.matrix;
  matrix.qweight = qweight.const_data_ptr<uint8_t>();
  matrix.blocksize = blocksize;
  matrix.rows = rows;
  matrix.cols = cols;
  if (!nested) {
    matrix.absmax = absmax.const_data_ptr<float>();
    return arguments;
  }

  STD_TORCH_CHECK(nested_blocksize > 0, "nested_blocksize must be positive, got ",
                  nested_blocksize);
  check_dtype("nested_absmax", *nested_absmax, ScalarType::Float);
  check_contiguous("nested_absmax", *nested_absmax);
  check_device("nested_absmax", *nested_absmax, qweight, "qweight");
  check_numel("nested_absmax", *nested_absmax, ceil_div(blocks, nested_blocksize),
              "one for every " + std::to_string(nested_blocksize) + " of " +
                  std::to_string(blocks) + " blocks");
  check_dtype("nested_code", *nested_code, ScalarType::Float);
  check_contiguous("nested_code", *nested_code);
  check_device("nested_code", *nested_code, qweight, "qweight");
  check_numel("nested_code", *nested_code, 256, "one for every value of a byte");
  check_dtype("offset", *offset, ScalarType::Float);
  check_device("offset", *offset, qweight, "qweight");
  check_numel("offset", *offset, 1, "a scalar");
  matrix.absmax_q = absmax.const_data_ptr<uint8_t>();
  matrix.nested_absmax = nested_absmax->const_data_ptr<float>();
  matrix.nested_code = nested_code->const_data_ptr<float>();
  matrix.nested_blocksize = nested_blocksize;
  arguments.offset = offset->const_data_ptr<float>();
  return arguments;
}

// The same for the CPU, where the offset can be read at once.
inline NF4Matrix check_nf4_cpu(const Tensor& qweight, const Tensor& absmax,
                               const std::optional<Tensor>& nested_absmax,
                               const std::optional<Tensor>& nested_code,
                               const std::optional<Tensor>& offset, int64_t blocksize,
                               int64_t nested_blocksize, int64_t rows, int64_t cols) {
  NF4Arguments arguments = check_nf4(qweight, absmax, nested_absmax, nested_code, offset, blocksize,
                                     nested_blocksize, rows, cols);
  if (arguments.offset != nullptr) arguments.matrix.offset = *arguments.offset;
  return arguments.matrix;
}

}  // namespace pylora
