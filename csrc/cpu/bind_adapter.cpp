// CPU side of the bottleneck adapter: tensor -> checks -> kernel.
#include <iterator>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "common/boxed.h"
#include "cpu/bind.h"
#include "cpu/bottleneck_adapter.h"
#include "cpu/huge_pages.h"

namespace pylora::cpu {
namespace {

// A norm of an adapter, in the order of its schema; without one, the kind is 0.
struct NormTensors {
  using Fields = std::tuple<int64_t, std::optional<Tensor>, std::optional<Tensor>, double>;
  int64_t kind_code;
  std::optional<Tensor> weight;
  std::optional<Tensor> bias;
  double eps;
};

// The tensors of an adapter, in the order of its schema.
struct BottleneckTensors {
  using Fields = std::tuple<Tensor, std::optional<Tensor>, Tensor, std::optional<Tensor>, double,
                            int64_t, double, std::optional<Tensor>, NormTensors, NormTensors>;
  Tensor down;
  std::optional<Tensor> down_bias;
  Tensor up;
  std::optional<Tensor> up_bias;
  double scaling;
  int64_t activation_code;
  double dropout_p;
  std::optional<Tensor> seed;
  NormTensors norm_before, norm_after;
};

// A checked norm, whose vectors are fp32 here.
struct CheckedNorm {
  CheckedNorm(const std::string& name, NormTensors& given, const Tokens& x) {
    constexpr int64_t kKinds = std::size(kNormNames);
    STD_TORCH_CHECK(given.kind_code >= 0 && given.kind_code < kKinds, name,
                    " must be a code from 0 (", kNormNames[0], ") to ", kKinds - 1, " (",
                    kNormNames[kKinds - 1], "), got ", given.kind_code);
    norm.kind = static_cast<NormKind>(given.kind_code);
    STD_TORCH_CHECK(given.weight.has_value() == norm.enabled(), name, "_weight must ",
                    norm.enabled() ? "" : "not ", "be given if ", name, " is ",
                    kNormNames[given.kind_code], ", got ", norm.enabled() ? "none" : "one");
    STD_TORCH_CHECK(norm.enabled() || !given.bias.has_value(), name, "_bias must not be given if ",
                    name, " is none, got one");
    weight.add((name + "_weight").c_str(), given.weight, x.cols, x);
    bias.add((name + "_bias").c_str(), given.bias, x.cols, x);
    norm.weight = weight.data();
    norm.bias = bias.data();
    norm.eps = given.eps;
  }

  Norm norm;
  BiasSum weight, bias;
};

// A checked call, as far as forward and backward share it.
struct Adapter {
  Adapter(const Tokens& x, BottleneckTensors& tensors)
      : before("norm_before", tensors.norm_before, x), after("norm_after", tensors.norm_after, x) {
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
    args.norm_before = before.norm;
    args.norm_after = after.norm;
    args.dropout = to_dropout(check_dropout(tensors.dropout_p, tensors.seed, nullptr, x));
  }

  CheckedNorm before, after;
  BottleneckArgs args;
  BiasSum down_bias, up_bias;
};

// The gradients of a norm's weight and bias, of which those that are not wanted are empty.
class NormGradients {
 public:
  NormGradients(const NormTensors& norm, const Tokens& x, bool wants_weight, bool wants_bias)
      : columns_(static_cast<size_t>(x.cols)),
        wants_weight_(wants_weight && norm.weight.has_value()),
        wants_bias_(wants_bias && norm.bias.has_value()),
        sums_(wants_weight_ || wants_bias_ ? 2 * columns_ : 0) {}

  float* sums() { return sums_.empty() ? nullptr : sums_.data(); }
  Tensor weight(const NormTensors& norm, const Tokens& x) const {
    return gradient(wants_weight_, 0, norm.weight, x);
  }
  Tensor bias(const NormTensors& norm, const Tokens& x) const {
    return gradient(wants_bias_, columns_, norm.bias, x);
  }

 private:
  Tensor gradient(bool wanted, size_t first, const std::optional<Tensor>& like,
                  const Tokens& x) const {
    if (!wanted) return new_like(x.tensor, false);
    return to_tensor(std::span(sums_).subspan(first, columns_), 1.0f, *like);
  }

  size_t columns_;
  bool wants_weight_, wants_bias_;
  std::vector<float> sums_;
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

// Checks a tensor that takes a result like x; returns its memory.
void* result_memory(const char* name, Tensor& given, const Tokens& x) {
  STD_TORCH_CHECK(given.is_contiguous(), name, " must be contiguous, got strides ",
                  to_string(given.strides()));
  like_x(name, given, x);
  return given.mutable_data_ptr();
}

void run_forward(const Tokens& x, const std::optional<Tensor>& given_residual,
                 BottleneckTensors& tensors, void* y) {
  Adapter adapter(x, tensors);
  std::optional<Tokens> residual;
  if (given_residual.has_value()) {
    residual.emplace(like_x("residual", *given_residual, x));
    adapter.args.residual = residual->data;
  }
  adapter.args.y = y;
  bottleneck_adapter(adapter.args);
}

Tensor bottleneck_adapter_cpu(const Tensor& given_x, const std::optional<Tensor>& residual,
                              BottleneckTensors& tensors) {
  const Tokens x("x", given_x);
  Tensor y = new_tokens(x);
  run_forward(x, residual, tensors, y.mutable_data_ptr());
  return y;
}

void bottleneck_adapter_into_cpu(const Tensor& given_x, const std::optional<Tensor>& residual,
                                 BottleneckTensors& tensors, Tensor& y) {
  const Tokens x("x", given_x);
  run_forward(x, residual, tensors, result_memory("y", y, x));
}

// The gradients of x, down and up with their biases, and of the norms. Those that output_mask leaves
// out are empty.
using BackwardResults =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// dx goes into `given_dx` if there is one, and is then empty among the results.
BackwardResults run_backward(const Tensor& given_grad, const Tensor& given_x, bool adds_x,
                             BottleneckTensors& tensors, const std::vector<bool>& output_mask,
                             Tensor* given_dx) {
  STD_TORCH_CHECK(output_mask.size() == 9, "output_mask must have 9 values, got ",
                  output_mask.size());
  const Tokens x("x", given_x), grad = like_x("grad", given_grad, x);
  Adapter adapter(x, tensors);
  BottleneckArgs& args = adapter.args;
  const bool makes_dx = output_mask[0] && given_dx == nullptr;
  Tensor dx = makes_dx ? new_tokens(x) : new_like(x.tensor, false);
  Tensor ddown = new_like(tensors.down, output_mask[1]);
  Tensor dup = new_like(tensors.up, output_mask[3]);
  std::vector<float> bottleneck_sums(output_mask[2] ? static_cast<size_t>(args.size) : 0);
  std::vector<float> dz_sums(output_mask[4] ? static_cast<size_t>(x.cols) : 0);
  NormGradients before(tensors.norm_before, x, output_mask[5], output_mask[6]);
  NormGradients after(tensors.norm_after, x, output_mask[7], output_mask[8]);
  args.grad = grad.data;
  args.adds_x = adds_x;
  if (makes_dx) args.dx = dx.mutable_data_ptr();
  if (given_dx != nullptr) args.dx = result_memory("dx", *given_dx, x);
  args.ddown = output_mask[1] ? ddown.mutable_data_ptr() : nullptr;
  args.dup = output_mask[3] ? dup.mutable_data_ptr() : nullptr;
  args.ddown_bias = bottleneck_sums.empty() ? nullptr : bottleneck_sums.data();
  args.dz_sums = dz_sums.empty() ? nullptr : dz_sums.data();
  args.before_sums = before.sums();
  args.after_sums = after.sums();
  bottleneck_adapter_backward(args);
  return {dx,
          ddown,
          to_tensor(bottleneck_sums, 1.0f, tensors.down),
          dup,
          to_tensor(dz_sums, args.scaling, tensors.up),
          before.weight(tensors.norm_before, x),
          before.bias(tensors.norm_before, x),
          after.weight(tensors.norm_after, x),
          after.bias(tensors.norm_after, x)};
}

BackwardResults bottleneck_adapter_backward_cpu(const Tensor& grad, const Tensor& x, bool adds_x,
                                                BottleneckTensors& tensors,
                                                const std::vector<bool>& output_mask) {
  return run_backward(grad, x, adds_x, tensors, output_mask, nullptr);
}

BackwardResults bottleneck_adapter_backward_into_cpu(const Tensor& grad, const Tensor& x,
                                                     bool adds_x, BottleneckTensors& tensors,
                                                     const std::vector<bool>& output_mask,
                                                     Tensor& dx) {
  return run_backward(grad, x, adds_x, tensors, output_mask, &dx);
}

}  // namespace
}  // namespace pylora::cpu

STABLE_TORCH_LIBRARY_IMPL(pylora_C, CPU, m) {
  using namespace pylora::cpu;
  using pylora::boxed;
  m.impl("bottleneck_adapter", boxed<bottleneck_adapter_cpu>);
  m.impl("bottleneck_adapter_into", boxed<bottleneck_adapter_into_cpu>);
  m.impl("bottleneck_adapter_backward", boxed<bottleneck_adapter_backward_cpu>);
  m.impl("bottleneck_adapter_backward_into", boxed<bottleneck_adapter_backward_into_cpu>);
}
