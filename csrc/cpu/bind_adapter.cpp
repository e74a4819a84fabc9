// CPU side of the bottleneck adapter: tensor -> checks -> kernel.
#include <optional>
#include <tuple>
#include <vector>

#include "common/boxed.h"
#include "cpu/bind.h"
#include "cpu/bottleneck_adapter.h"
#include "cpu/huge_pages.h"

namespace pylora::cpu {
namespace {

// The tensors of an adapter, in the order of its schema.
struct BottleneckTensors {
  using Fields =
      std::tuple<Tensor, std::optional<Tensor>, Tensor, std::optional<Tensor>, double, int64_t>;
  Tensor down;
  std::optional<Tensor> down_bias;
  Tensor up;
  std::optional<Tensor> up_bias;
  double scaling;
  int64_t activation_code;
};

// A checked call, as far as forward and backward share it.
struct Adapter {
  Adapter(const Tokens& x, BottleneckTensors& tensors) {
    STD_TORCH_CHECK(x.cols > 0, "x must have a column or more, got shape ", to_string(x.shape));
    check_given("down_weight", tensors.down);
    check_dim("down_weight", tensors.down, 2);
    args.size = tensors.down.size(0);
    STD_TORCH_CHECK(args.size >= 1 && args.size <= kMaxBottleneck, "down_weight must have 1 to ",
                    kMaxBottleneck, " rows (the bottleneck), got ", args.size);
    const ScalarType type = tensors.down.scalar_type();
    check_factor("down_weight", tensors.down, {args.size, x.cols}, type, x);
    check_factor("up_weight", tensors.up, {x.cols, args.size}, type, x);
    args.x = x.data;
    args.dtype = x.dtype();
    args.tokens = x.count;
    args.hidden = x.cols;
    args.down = tensors.down.const_data_ptr();
    args.up = tensors.up.const_data_ptr();
    args.weight_dtype = to_dtype("down_weight", type);
    args.scaling = static_cast<float>(tensors.scaling);
    args.activation = to_activation(tensors.activation_code);
    down_bias.add("down_bias", tensors.down_bias, args.size, x);
    up_bias.add("up_bias", tensors.up_bias, x.cols, x, args.scaling);
    args.down_bias = down_bias.data();
    args.up_bias = up_bias.data();
  }

  BottleneckArgs args;
  BiasSum down_bias, up_bias;
};

// Checks a tensor of x's shape and dtype.
Tokens like_x(const char* name, const Tensor& given, const Tokens& x) {
  Tokens tokens(name, given);
  check_dtype(name, tokens.tensor, x.tensor.scalar_type());
  check_device(name, tokens.tensor, x.tensor, "x");
  STD_TORCH_CHECK(tokens.shape == x.shape, name, " must have the shape of x, ", to_string(x.shape),
                  ", got ", to_string(tokens.shape));
  return tokens;
}

// A new tensor of x's shape; the first write to it makes large pages.
Tensor new_tokens(const Tokens& x) {
  Tensor out = x.new_rows(x.cols);
  advise_huge_pages(out.mutable_data_ptr(), x.count * x.cols * dtype_size(x.dtype()));
  return out;
}

Tensor bottleneck_adapter_cpu(const Tensor& given_x, const std::optional<Tensor>& given_residual,
                              BottleneckTensors& tensors) {
  const Tokens x("x", given_x);
  Adapter adapter(x, tensors);
  std::optional<Tokens> residual;
  if (given_residual.has_value()) {
    residual.emplace(like_x("residual", *given_residual, x));
    adapter.args.residual = residual->data;
  }
  Tensor y = new_tokens(x);
  adapter.args.y = y.mutable_data_ptr();
  bottleneck_adapter(adapter.args);
  return y;
}

// The gradients that output_mask leaves out are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_adapter_backward_cpu(
    const Tensor& given_grad, const Tensor& given_x, bool adds_x, BottleneckTensors& tensors,
    const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 5, "output_mask must have 5 values, got ",
                  output_mask.size());
  const Tokens x("x", given_x), grad = like_x("grad", given_grad, x);
  Adapter adapter(x, tensors);
  BottleneckArgs& args = adapter.args;
  Tensor dx = output_mask[0] ? new_tokens(x) : new_like(x.tensor, false);
  Tensor ddown = new_like(tensors.down, output_mask[1]);
  Tensor dup = new_like(tensors.up, output_mask[3]);
  std::vector<float> bottleneck_sums(output_mask[2] ? static_cast<size_t>(args.size) : 0);
  std::vector<float> grad_sums(output_mask[4] ? static_cast<size_t>(x.cols) : 0);
  args.grad = grad.data;
  args.adds_x = adds_x;
  args.dx = output_mask[0] ? dx.mutable_data_ptr() : nullptr;
  args.ddown = output_mask[1] ? ddown.mutable_data_ptr() : nullptr;
  args.dup = output_mask[3] ? dup.mutable_data_ptr() : nullptr;
  args.ddown_bias = bottleneck_sums.empty() ? nullptr : bottleneck_sums.data();
  args.grad_sums = grad_sums.empty() ? nullptr : grad_sums.data();
  bottleneck_adapter_backward(args);
  return {dx, ddown, to_tensor(bottleneck_sums, 1.0f, tensors.down), dup,
          to_tensor(grad_sums, args.scaling, tensors.up)};
}

}  // namespace
}  // namespace pylora::cpu

STABLE_TORCH_LIBRARY_IMPL(pylora_C, CPU, m) {
  m.impl("bottleneck_adapter", pylora::boxed<pylora::cpu::bottleneck_adapter_cpu>);
  m.impl("bottleneck_adapter_backward",
         pylora::boxed<pylora::cpu::bottleneck_adapter_backward_cpu>);
}
