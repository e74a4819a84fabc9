// The tensors of an op as its schema groups them, with the one check that each group has. They come
// with any strides; a check makes contiguous what a kernel is going to read, and the copies live as
// long as the call.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "common/activation.h"
#include "common/check.h"

namespace pylora {

inline void make_contiguous(Tensor& tensor) {
  if (!tensor.is_contiguous()) tensor = torch::stable::contiguous(tensor);
}

// What differs between the calls of a prepared layer (prepared.h).
struct PreparedCall {
  const void* x = nullptr;  // [tokens, in_features], contiguous, of the prepared dtype and device
  int64_t tokens = 0;
  void* y = nullptr;   // [tokens, out_features], of x's dtype
  float* h = nullptr;  // [tokens, r], or null if the caller does not want it
  double scaling = 1.0;
  double dropout_p = 0.0;
  const int64_t* seed = nullptr;  // on the device of x; null without dropout
};

// A tensor [..., cols] as a matrix of tokens. Its leading sizes multiply to the number of tokens,
// also if there are no columns.
struct Tokens {
  Tokens(const char* argument, const Tensor& given) : name(argument), tensor(given) {
    const auto sizes = tensor.sizes();
    STD_TORCH_CHECK(sizes.size() > 0, name, " must have 1 dimension or more, got a scalar");
    shape.assign(sizes.begin(), sizes.end());
    cols = shape.back();
    for (size_t i = 0; i + 1 < shape.size(); ++i) count *= shape[i];
    make_contiguous(tensor);
    data = tensor.const_data_ptr();
  }

  // The tokens of another tensor, contiguous and of the dtype and device of `like`.
  Tokens(const char* argument, const Tensor& like, const void* memory, int64_t tokens,
         int64_t columns)
      : name(argument),
        tensor(like),
        shape{tokens, columns},
        count(tokens),
        cols(columns),
        data(memory) {
    STD_TORCH_CHECK(data != nullptr || count * cols == 0, name, " must have memory, got none");
  }

  DType dtype() const { return to_dtype(name, tensor.scalar_type()); }

  // A tensor of the same leading sizes, not initialized.
  Tensor new_rows(int64_t columns, std::optional<ScalarType> type = std::nullopt) const {
    std::vector<int64_t> sizes = shape;
    sizes.back() = columns;
    return torch::stable::new_empty(tensor, sizes, type);
  }

  const char* name;
  Tensor tensor;
  std::vector<int64_t> shape;
  int64_t count = 1;
  int64_t cols = 0;
  const void* data = nullptr;
};

// A checked NF4 weight as pointers. `offset` points to where the value lies, which may be another
// device's memory; the CPU's bind code reads it into the matrix.
struct NF4Arguments {
  NF4Matrix matrix;
  const float* offset = nullptr;
};

struct NF4Tensors {
  using Fields = std::tuple<Tensor, Tensor, std::optional<Tensor>, std::optional<Tensor>,
                            std::optional<Tensor>, int64_t, int64_t>;
  Tensor qweight, absmax;
  std::optional<Tensor> nested_absmax, nested_code, offset;
  int64_t blocksize, nested_blocksize;

  NF4Arguments check(int64_t rows, int64_t cols) {
    check_blocksize(blocksize);
    const int64_t sizes[] = {rows, cols};
    const int64_t numel = checked_numel("shape", sizes);
    const int64_t blocks = ceil_div(numel, blocksize);
    const bool nested = nested_absmax.has_value();
    STD_TORCH_CHECK(
        nested_code.has_value() == nested && offset.has_value() == nested,
        "nested_absmax, nested_code and offset must be given together or not at all, got ",
        nested ? "" : "no ", "nested_absmax, ", nested_code.has_value() ? "" : "no ",
        "nested_code and ", offset.has_value() ? "" : "no ", "offset");

    NF4Arguments arguments;
    NF4Matrix& matrix = arguments.matrix;
    matrix.blocksize = blocksize;
    matrix.rows = rows;
    matrix.cols = cols;
    matrix.qweight = values<uint8_t>("qweight", qweight, ScalarType::Byte, ceil_div(numel, 2),
                                     "two of the weight's ", numel, " elements a byte");
    const auto absmax_type = nested ? ScalarType::Byte : ScalarType::Float;
    const void* stored = values<void>("absmax", absmax, absmax_type, blocks, "one for every ",
                                      blocksize, " of ", numel, " elements");
    if (!nested) {
      matrix.absmax = static_cast<const float*>(stored);
      return arguments;
    }
    STD_TORCH_CHECK(nested_blocksize > 0, "nested_blocksize must be positive, got ",
                    nested_blocksize);
    matrix.absmax_q = static_cast<const uint8_t*>(stored);
    matrix.nested_blocksize = nested_blocksize;
    matrix.nested_absmax = values<float>("nested_absmax", *nested_absmax, ScalarType::Float,
                                         ceil_div(blocks, nested_blocksize), "one for every ",
                                         nested_blocksize, " of ", blocks, " blocks");
    matrix.nested_code = values<float>("nested_code", *nested_code, ScalarType::Float, 256,
                                       "one for every value of a byte");
    arguments.offset = values<float>("offset", *offset, ScalarType::Float, 1, "a scalar");
    return arguments;
  }

 private:
  template <class T, class... Why>
  const T* values(const char* name, Tensor& tensor, ScalarType type, int64_t count,
                  const Why&... why) const {
    check_given(name, tensor);
    check_dtype(name, tensor, type);
    check_numel(name, tensor, count, why...);
    if (&tensor != &qweight) check_device(name, tensor, qweight, "qweight");
    make_contiguous(tensor);
    return static_cast<const T*>(tensor.const_data_ptr());
  }
};

// A bias, or another vector with a value for each output.
inline void check_vector(const char* name, Tensor& vector, int64_t size, const Tokens& x) {
  to_dtype(name, vector.scalar_type());
  check_numel(name, vector, size, "one for every output");
  check_device(name, vector, x.tensor, x.name);
  make_contiguous(vector);
}

// A vector of known dtype.
inline void check_values(const char* name, Tensor& values, ScalarType type, int64_t count,
                         const char* why, const Tokens& x) {
  check_dtype(name, values, type);
  check_numel(name, values, count, why);
  check_device(name, values, x.tensor, x.name);
  make_contiguous(values);
}

// The rank of lora_A, a matrix [rank, in_features] or a stack of them, as `dim` says.
inline int64_t check_rank(const Tensor& lora_A, int64_t dim, int64_t most) {
  check_given("lora_A", lora_A);
  check_dim("lora_A", lora_A, dim);
  const int64_t rank = lora_A.size(dim - 2);
  STD_TORCH_CHECK(rank >= 1 && rank <= most, "lora_A must have 1 to ", most,
                  " rows (the rank), got ", rank);
  return rank;
}

// lora_A or lora_B, a matrix or a stack of them. `type` is the dtype it must have.
template <size_t kDims>
inline void check_factor(const char* name, Tensor& factor, const int64_t (&sizes)[kDims],
                         ScalarType type, const Tokens& x) {
  check_given(name, factor);
  to_dtype(name, factor.scalar_type());
  check_dtype(name, factor, type);
  check_shape(name, factor, sizes);
  check_device(name, factor, x.tensor, x.name);
  make_contiguous(factor);
}

// Checked dropout; the seed lies on the device of x, and is null if nothing is dropped.
struct DropoutArguments {
  const int64_t* seed = nullptr;
  uint32_t threshold = 0;  // elements whose 32-bit word is below this are dropped
  float keep_scale = 1.0f;
};

// Checks the dropout of a call for x. The seed is a tensor, or at `seed_data` if the caller has none.
inline DropoutArguments check_dropout(double p, const std::optional<Tensor>& seed,
                                      const int64_t* seed_data, const Tokens& x) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout_p must be in [0, 1), got ", p);
  if (p == 0.0) return {};
  STD_TORCH_CHECK(seed.has_value() || seed_data != nullptr,
                  "seed must be given if dropout_p is not 0, got none");
  if (seed.has_value()) {
    check_dtype("seed", *seed, ScalarType::Long);
    check_numel("seed", *seed, 1, "a scalar");
    check_device("seed", *seed, x.tensor, x.name);
  }
  const double threshold = p * 4294967296.0 + 0.5;
  return {
      .seed = seed.has_value() ? seed->const_data_ptr<int64_t>() : seed_data,
      .threshold = threshold < 4294967295.0 ? static_cast<uint32_t>(threshold) : 4294967295u,
      .keep_scale = static_cast<float>(1.0 / (1.0 - p)),
  };
}

inline Activation to_activation(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code < kActivations, "activation must be a code from 0 (",
                  kActivationNames[0], ") to ", kActivations - 1, " (",
                  kActivationNames[kActivations - 1], "), got ", code);
  return static_cast<Activation>(code);
}

struct LowRankOptions {
  using Fields = std::tuple<double, double, std::optional<Tensor>, int64_t>;
  double scaling, dropout_p;
  std::optional<Tensor> seed;
  int64_t activation_code;
  const int64_t* seed_data = nullptr;  // in place of `seed`, if the caller has no tensor

  // Takes the options of one call of a prepared layer.
  void take(const PreparedCall& call) {
    scaling = call.scaling;
    dropout_p = call.dropout_p;
    seed.reset();
    seed_data = call.seed;
  }

  Activation activation() const { return to_activation(activation_code); }

  DropoutArguments dropout(const Tokens& x) const {
    return check_dropout(dropout_p, seed, seed_data, x);
  }
};

// The low-rank path of lora_linear and all biases, in the order of its schema.
struct LowRankTensors {
  using Fields = std::tuple<Tensor, Tensor, std::optional<Tensor>, std::optional<Tensor>,
                            std::optional<Tensor>, LowRankOptions>;
  Tensor lora_A, lora_B;
  std::optional<Tensor> bias, lora_A_bias, lora_B_bias;  // `bias` is the base's
  LowRankOptions options;
};

}  // namespace pylora
