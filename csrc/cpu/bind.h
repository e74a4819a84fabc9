// What the bind files of this folder share.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "common/float16.h"
#include "common/tensors.h"
#include "cpu/philox.h"

namespace pylora::cpu {

// A checked NF4 weight; the CPU can read its offset at once.
inline NF4Matrix to_matrix(NF4Tensors& weight, int64_t rows, int64_t cols) {
  NF4Arguments arguments = weight.check(rows, cols);
  if (arguments.offset != nullptr) arguments.matrix.offset = *arguments.offset;
  return arguments.matrix;
}

// Checked dropout; the CPU can read its seed at once.
inline Dropout to_dropout(const DropoutArguments& given) {
  if (given.seed == nullptr) return {};
  return {.seed = static_cast<uint64_t>(*given.seed),
          .threshold = given.threshold,
          .scale = given.keep_scale,
          .enabled = true};
}

// Biases are added up here, in fp32; without any, there is no sum.
class BiasSum {
 public:
  void add(const char* name, std::optional<Tensor>& bias, int64_t size, const Tokens& x,
           float scale = 1.0f) {
    if (!bias.has_value()) return;
    check_vector(name, *bias, size, x);
    sum_.resize(static_cast<size_t>(size), 0.0f);
    visit_dtype(to_dtype(name, bias->scalar_type()), [&](auto element) {
      const auto* values = static_cast<const decltype(element)*>(bias->const_data_ptr());
      for (size_t i = 0; i < sum_.size(); ++i) sum_[i] += scale * to_float(values[i]);
    });
  }

  const float* data() const { return sum_.empty() ? nullptr : sum_.data(); }

 private:
  std::vector<float> sum_;
};

// A vector of fp32 as a tensor of `like`'s dtype, each value times `scale`.
inline Tensor to_tensor(std::span<const float> values, float scale, const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, {static_cast<int64_t>(values.size())});
  visit_dtype(to_dtype("gradient", like.scalar_type()), [&](auto element) {
    using T = decltype(element);
    auto* data = static_cast<T*>(out.mutable_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) data[i] = from_float<T>(scale * values[i]);
  });
  return out;
}

// The memory of a gradient of `like`; it is empty if the gradient is not wanted.
inline Tensor new_like(const Tensor& like, bool wanted) {
  return wanted ? torch::stable::new_empty(like, like.sizes())
                : torch::stable::new_empty(like, {0});
}

}  // namespace pylora::cpu
