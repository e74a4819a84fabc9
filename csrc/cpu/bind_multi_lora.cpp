// CPU side of the adapters of multi_lora_linear: tensors -> checks -> kernel.
#include <tuple>
#include <vector>

#include "common/boxed.h"
#include "cpu/bind.h"
#include "cpu/multi_lora_linear.h"

namespace pylora::cpu {
namespace {

// The adapters of a call, in the order of the ops' schemas.
struct AdapterTensors {
  using Fields = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  Tensor lora_A, lora_B, ids, scalings;
};

// What forward and backward share, checked.
MultiLoraArgs to_multi_lora(const Tokens& x, int64_t out_features, AdapterTensors& adapters) {
  STD_TORCH_CHECK(x.cols > 0, "x must have a column or more, got shape ", to_string(x.shape));
  const int64_t rank = check_rank(adapters.lora_A, 3, kMaxRank), count = adapters.lora_A.size(0);
  const ScalarType type = adapters.lora_A.scalar_type();
  check_factor("lora_A", adapters.lora_A, {count, rank, x.cols}, type, x);
  check_factor("lora_B", adapters.lora_B, {count, out_features, rank}, type, x);
  check_values("adapter_ids", adapters.ids, ScalarType::Long, x.count, "one for every token", x);
  check_values("scalings", adapters.scalings, ScalarType::Float, count, "one for every adapter", x);
  const auto factor = [&](const Tensor& stack, bool rank_first) {
    return AdapterFactor{const_cast<void*>(stack.const_data_ptr()), to_dtype("lora_A", type), rank,
                         rank_first};
  };
  MultiLoraArgs args;
  args.x = {x.data, x.dtype(), x.count, x.cols, {}, nullptr};
  args.out_features = out_features;
  args.ids = adapters.ids.const_data_ptr<int64_t>();
  args.scalings = adapters.scalings.const_data_ptr<float>();
  args.adapters = count;
  args.lora_A = factor(adapters.lora_A, true);
  args.lora_B = factor(adapters.lora_B, false);
  return args;
}

// The memory of results of the base, to which the adapters are added. They have x's dtype and its
// number of tokens.
void* checked_sum(const char* name, Tensor& given, const Tokens& x, int64_t cols) {
  check_dtype(name, given, x.tensor.scalar_type());
  check_device(name, given, x.tensor, "x");
  check_numel(name, given, x.count * cols, cols, " for every token of x");
  STD_TORCH_CHECK(given.is_contiguous(), name, " must be contiguous, got strides ",
                  to_string(given.strides()));
  return given.mutable_data_ptr();
}

// Adds the adapters to y, the result of the base; returns h.
Tensor multi_lora_add_cpu(const Tensor& given_x, AdapterTensors& adapters, Tensor& y) {
  const Tokens x("x", given_x);
  check_dim("lora_B", adapters.lora_B, 3);
  MultiLoraArgs args = to_multi_lora(x, adapters.lora_B.size(1), adapters);
  args.y = checked_sum("y", y, x, args.out_features);
  Tensor h = x.new_rows(args.lora_A.rank, ScalarType::Float);
  args.h = h.mutable_data_ptr<float>();
  multi_lora_linear(args);
  return h;
}

// Adds the adapters to dx, the gradient of the base, unless there is none; returns the gradients of
// lora_A and lora_B, of which those that output_mask leaves out are empty.
std::tuple<Tensor, Tensor> multi_lora_add_backward_cpu(const Tensor& given_grad,
                                                       const Tensor& given_x, const Tensor& given_h,
                                                       AdapterTensors& adapters,
                                                       const std::vector<bool>& output_mask,
                                                       std::optional<Tensor>& dx) {
  STD_TORCH_CHECK(output_mask.size() == 2, "output_mask must have 2 values, got ",
                  output_mask.size());
  const Tokens grad("grad", given_grad), x("x", given_x), h("h", given_h);
  check_dtype("grad", grad.tensor, x.tensor.scalar_type());
  check_device("grad", grad.tensor, x.tensor, "x");
  STD_TORCH_CHECK(grad.count == x.count, "grad must have as many rows as x (", x.count, "), got ",
                  grad.count);
  MultiLoraArgs args = to_multi_lora(x, grad.cols, adapters);
  const int64_t rank = args.lora_A.rank;
  check_dtype("h", h.tensor, ScalarType::Float);
  check_numel("h", h.tensor, x.count * rank, "the rank, ", rank, ", for every row of x");
  args.grad = grad.data;
  args.h = const_cast<float*>(h.tensor.const_data_ptr<float>());
  if (dx.has_value()) args.dx = checked_sum("dx", *dx, x, x.cols);
  Tensor dlora_A = new_like(adapters.lora_A, output_mask[0]);
  Tensor dlora_B = new_like(adapters.lora_B, output_mask[1]);
  if (output_mask[0]) args.dlora_A = dlora_A.mutable_data_ptr();
  if (output_mask[1]) args.dlora_B = dlora_B.mutable_data_ptr();
  multi_lora_linear_backward(args);
  return {dlora_A, dlora_B};
}

}  // namespace
}  // namespace pylora::cpu

STABLE_TORCH_LIBRARY_IMPL(pylora_C, CPU, m) {
  using namespace pylora::cpu;
  using pylora::boxed;
  m.impl("multi_lora_add", boxed<multi_lora_add_cpu>);
  m.impl("multi_lora_add_backward", boxed<multi_lora_add_backward_cpu>);
}
