// CPU side of the linear ops: tensor -> checks -> kernel. Weights are NF4 here; a dense base goes
// to torch's own matmul in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/float16.h"
#include "common/linear_arguments.h"
#include "cpu/lora_linear.h"
#include "cpu/nf4_linear.h"

namespace pylora::cpu {
namespace {

// An optional vector of `size` values, times `scale`, added to `sum`, which is empty before the
// first.
void add_bias(const char* name, const std::optional<Tensor>& bias, int64_t size, float scale,
              std::vector<float>& sum) {
  if (!bias.has_value()) return;
  const DType dtype = to_dtype(name, bias->scalar_type());
  check_vector(name, *bias, size);
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

Dropout to_dropout(double p, const std::optional<Tensor>& seed) {
  const Tensor* drawn_from = check_dropout(p, seed);
  if (drawn_from == nullptr) return {};
  return {
      .seed = static_cast<uint64_t>(*drawn_from->const_data_ptr<int64_t>()),
      .threshold = drop_threshold(p),
      .scale = static_cast<float>(1.0 / (1.0 - p)),
      .enabled = true,
  };
}

AdapterFactor to_factor(const char* name, const Tensor& tensor, int64_t rank, int64_t features,
                        bool rank_first) {
  check_matrix(name, tensor, rank_first ? rank : features, rank_first ? features : rank);
  return {const_cast<void*>(tensor.const_data_ptr()), to_dtype(name, tensor.scalar_type()), rank,
          rank_first};
}

// What forward and backward share.
LoraLinear to_lora_linear(const Tensor& x, const NF4Matrix& weight, const Tensor& lora_A,
                          const Tensor& lora_B, double scaling, double dropout_p,
                          const std::optional<Tensor>& seed, StringHandle activation) {
  check_matrix("lora_A", lora_A);
  const int64_t rank = lora_A.size(0);
  STD_TORCH_CHECK(rank >= 1 && rank <= kMaxRank, "lora_A must have 1 to ", kMaxRank,
                  " rows (the rank), got ", rank);
  check_dtype("lora_B", lora_B, lora_A.scalar_type());
  LoraLinear op;
  op.x = {x.const_data_ptr(), to_dtype("x", x.scalar_type()), x.size(0), x.size(1),
          to_dropout(dropout_p, seed)};
  op.lora_A = to_factor("lora_A", lora_A, rank, weight.cols, true);
  op.lora_B = to_factor("lora_B", lora_B, rank, weight.rows, false);
  op.scaling = static_cast<float>(scaling);
  op.activation = to_activation(activation);
  op.linear.dtype = op.x.dtype;
  op.linear.weight = weight;
  op.linear.rows = op.x.rows;
  return op;
}

std::tuple<Tensor, Tensor> lora_linear_cpu(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& absmax,
    const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
    const std::optional<Tensor>& offset, int64_t blocksize, int64_t nested_blocksize,
    int64_t out_features, const Tensor& lora_A, const Tensor& lora_B,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& lora_A_bias,
    const std::optional<Tensor>& lora_B_bias, double scaling, double dropout_p,
    const std::optional<Tensor>& seed, StringHandle activation) {
  STD_TORCH_CHECK(absmax.has_value(), "absmax must be given: this op takes NF4 weights only");
  check_matrix("x", x);
  const NF4Matrix matrix = check_nf4_cpu(weight, *absmax, nested_absmax, nested_code, offset,
                                         blocksize, nested_blocksize, out_features, x.size(1));
  LoraLinear op = to_lora_linear(x, matrix, lora_A, lora_B, scaling, dropout_p, seed, activation);
  std::vector<float> bias_sum;
  add_bias("bias", bias, out_features, 1.0f, bias_sum);
  add_bias("lora_B_bias", lora_B_bias, out_features, op.scaling, bias_sum);
  std::vector<float> low_bias;
  add_bias("lora_A_bias", lora_A_bias, op.lora_A.rank, 1.0f, low_bias);
  Tensor y = torch::stable::new_empty(x, {x.size(0), out_features});
  Tensor h = torch::stable::new_empty(x, {x.size(0), op.lora_A.rank}, ScalarType::Float);
  op.linear.x = x.const_data_ptr();
  op.linear.y = y.mutable_data_ptr();
  op.linear.bias = bias_sum.empty() ? nullptr : bias_sum.data();
  op.lora_A_bias = low_bias.empty() ? nullptr : low_bias.data();
  op.h = h.mutable_data_ptr<float>();
  lora_linear(op);
  return {y, h};
}

// A vector of fp32 as a tensor of `like`'s dtype, each value times `scale`.
Tensor to_tensor(const std::vector<float>& values, float scale, const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, {static_cast<int64_t>(values.size())});
  visit_dtype(to_dtype("gradient", like.scalar_type()), [&](auto element) {
    using T = decltype(element);
    auto* data = static_cast<T*>(out.mutable_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) data[i] = from_float<T>(scale * values[i]);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_backward_cpu(
    const Tensor& grad, const Tensor& x, const Tensor& h, const Tensor& weight,
    const std::optional<Tensor>& absmax, const std::optional<Tensor>& nested_absmax,
    const std::optional<Tensor>& nested_code, const std::optional<Tensor>& offset,
    int64_t blocksize, int64_t nested_blocksize, const Tensor& lora_A, const Tensor& lora_B,
    double scaling, double dropout_p, const std::optional<Tensor>& seed, StringHandle activation,
    const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(absmax.has_value(), "absmax must be given: this op takes NF4 weights only");
  STD_TORCH_CHECK(output_mask.size() == 7, "output_mask must have 7 values, got ",
                  output_mask.size());
  STD_TORCH_CHECK(!output_mask[1], "output_mask must not ask for dweight: the weight is NF4");
  check_matrix("grad", grad);
  check_matrix("x", x);
  check_dtype("h", h, ScalarType::Float);
  check_dtype("grad", grad, x.scalar_type());
  const NF4Matrix matrix = check_nf4_cpu(weight, *absmax, nested_absmax, nested_code, offset,
                                         blocksize, nested_blocksize, grad.size(1), x.size(1));
  LoraLinear op = to_lora_linear(x, matrix, lora_A, lora_B, scaling, dropout_p, seed, activation);
  STD_TORCH_CHECK(grad.size(0) == x.size(0), "grad must have as many rows as x (", x.size(0),
                  "), got ", grad.size(0));
  check_matrix("h", h, x.size(0), op.lora_A.rank);
  const auto empty = [](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
  const bool want_bias = output_mask[4];
  const bool want_B_bias = output_mask[6];
  Tensor dx = output_mask[0] ? torch::stable::new_empty(x, {x.size(0), x.size(1)}) : empty(x);
  Tensor dlora_A =
      torch::stable::new_empty(lora_A, {output_mask[2] ? lora_A.size(0) : 0, lora_A.size(1)});
  Tensor dlora_B =
      torch::stable::new_empty(lora_B, {output_mask[3] ? lora_B.size(0) : 0, lora_B.size(1)});
  std::vector<float> low_sums(output_mask[5] ? static_cast<size_t>(op.lora_A.rank) : 0);
  std::vector<float> grad_sums(want_bias || want_B_bias ? static_cast<size_t>(matrix.rows) : 0);
  op.linear.x = grad.const_data_ptr();
  op.linear.y = output_mask[0] ? dx.mutable_data_ptr() : nullptr;
  op.linear.backward = true;
  op.h = const_cast<float*>(h.const_data_ptr<float>());
  op.dlora_A = output_mask[2] ? dlora_A.mutable_data_ptr() : nullptr;
  op.dlora_B = output_mask[3] ? dlora_B.mutable_data_ptr() : nullptr;
  op.dlora_A_bias = low_sums.empty() ? nullptr : low_sums.data();
  op.grad_sums = grad_sums.empty() ? nullptr : grad_sums.data();
  lora_linear_backward(op);
  return {dx,
          empty(x),
          output_mask[2] ? dlora_A : empty(lora_A),
          output_mask[3] ? dlora_B : empty(lora_B),
          want_bias ? to_tensor(grad_sums, 1.0f, grad) : empty(grad),
          output_mask[5] ? to_tensor(low_sums, 1.0f, lora_A) : empty(lora_A),
          want_B_bias ? to_tensor(grad_sums, op.scaling, lora_B) : empty(lora_B)};
}

}  // namespace
}  // namespace pylora::cpu

STABLE_TORCH_LIBRARY_IMPL(pylora_C, CPU, m) {
  m.impl("nf4_linear", TORCH_BOX(&pylora::cpu::nf4_linear_cpu));
  m.impl("nf4_linear_backward", TORCH_BOX(&pylora::cpu::nf4_linear_backward_cpu));
  m.impl("lora_linear", TORCH_BOX(&pylora::cpu::lora_linear_cpu));
  m.impl("lora_linear_backward", TORCH_BOX(&pylora::cpu::lora_linear_backward_cpu));
}
