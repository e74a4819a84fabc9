// CPU side of the linear ops: tensor -> checks -> kernel. Weights are NF4 here; a dense base goes to
// torch's own matmul in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/check.h"
#include "common/float16.h"
#include "cpu/nf4_linear.h"

namespace pylora {
namespace {

void check_matrix(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, got shape ",
                  to_string(tensor.sizes()));
  check_contiguous(name, tensor);
}

// An optional vector of `size` values, times `scale`, added to `sum`, which is empty before the first.
void add_bias(const char* name, const std::optional<Tensor>& bias, int64_t size, float scale,
              std::vector<float>& sum) {
  if (!bias.has_value()) return;
  const DType dtype = to_dtype(name, bias->scalar_type());
  check_contiguous(name, *bias);
  check_numel(name, *bias, size, "one for every output");
  sum.resize(static_cast<size_t>(size), 0.0f);
  visit_dtype(dtype, [&](auto element) {
    const auto* values = static_cast<const decltype(element)*>(bias->const_data_ptr());
    for (int64_t i = 0; i < size; ++i) sum[static_cast<size_t>(i)] += scale * to_float(values[i]);
  });
}

Tensor nf4_linear_cpu(const Tensor& x, const Tensor& qweight, const Tensor& absmax,
                      const std::optional<Tensor>& nested_absmax,
                      const std::optional<Tensor>& nested_code, const std::optional<Tensor>& offset,
                      int64_t blocksize, int64_t nested_blocksize, int64_t out_features,
                      const std::optional<Tensor>& bias) {
  check_matrix("x", x);
  LinearProblem problem;
  problem.dtype = to_dtype("x", x.scalar_type());
  problem.weight = check_nf4_cpu(qweight, absmax, nested_absmax, nested_code, offset, blocksize,
                                 nested_blocksize, out_features, x.size(1));
  std::vector<float> bias_sum;
  add_bias("bias", bias, out_features, 1.0f, bias_sum);
  Tensor y = torch::stable::new_empty(x, {x.size(0), out_features});
  problem.x = x.const_data_ptr();
  problem.y = y.mutable_data_ptr();
  problem.rows = x.size(0);
  problem.bias = bias_sum.empty() ? nullptr : bias_sum.data();
  run_linear(problem);
  return y;
}

Tensor nf4_linear_backward_cpu(const Tensor& grad, const Tensor& qweight, const Tensor& absmax,
                               const std::optional<Tensor>& nested_absmax,
                               const std::optional<Tensor>& nested_code,
                               const std::optional<Tensor>& offset, int64_t blocksize,
                               int64_t nested_blocksize, int64_t in_features) {
  check_matrix("grad", grad);
  LinearProblem problem;
  problem.dtype = to_dtype("grad", grad.scalar_type());
  problem.weight = check_nf4_cpu(qweight, absmax, nested_absmax, nested_code, offset, blocksize,
                                 nested_blocksize, grad.size(1), in_features);
  Tensor dx = torch::stable::new_empty(grad, {grad.size(0), in_features});
  problem.x = grad.const_data_ptr();
  problem.y = dx.mutable_data_ptr();
  problem.rows = grad.size(0);
  problem.backward = true;
  run_linear(problem);
  return dx;
}

}  // namespace
}  // namespace pylora

STABLE_TORCH_LIBRARY_IMPL(pylora_C, CPU, m) {
  m.impl("nf4_linear", TORCH_BOX(&pylora::nf4_linear_cpu));
  m.impl("nf4_linear_backward", TORCH_BOX(&pylora::nf4_linear_backward_cpu));
}
