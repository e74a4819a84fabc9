// GPU side of the linear ops: tensor -> checks -> stream -> launcher. Weights are NF4 here;
// nf4_linear and lora_linear take few tokens, their _hopper twins many on sm_90a, and
// pylora/backends/cuda.py sends everything else elsewhere.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "common/linear_arguments.h"
#include "cuda/bind.h"
#include "cuda/lora_hidden_many.cuh"
#include "cuda/lora_linear.cuh"
#include "cuda/nf4_linear_backward.cuh"
#include "cuda/nf4_linear_hopper.cuh"

namespace pylora::cuda {
namespace {

constexpr int64_t kAlignment = 16;  // bytes, of what is read 16 at a time

void check_aligned(const char* name, const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  STD_TORCH_CHECK(address % kAlignment == 0, name, " must be aligned to ", kAlignment,
                  " bytes, got address ", address);
}

bool is_power_of_two(int64_t value) { return value > 0 && (value & (value - 1)) == 0; }

Vector to_vector(const char* name, const std::optional<Tensor>& tensor, int64_t size,
                 const Tensor& x) {
  if (!tensor.has_value()) return {};
  check_vector(name, *tensor, size);
  check_device(name, *tensor, x, "x");
  return {tensor->const_data_ptr(), to_dtype(name, tensor->scalar_type())};
}

void check_not_fp32(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(to_dtype(name, tensor.scalar_type()) != DType::kFloat32, name,
                  " must be float16 or bfloat16, got Float");
}

// x or grad on the weight.
NF4Arguments check_rows(const char* name, const Tensor& x, const Tensor& qweight,
                        const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
                        const std::optional<Tensor>& nested_code,
                        const std::optional<Tensor>& offset, int64_t blocksize,
                        int64_t nested_blocksize, int64_t out_features, int64_t in_features,
                        int64_t most_rows) {
  check_not_fp32(name, x);
  STD_TORCH_CHECK(x.size(0) <= most_rows, name, " must have at most ", most_rows,
                  " rows where blocksize is ", blocksize, ", got ", x.size(0));
  const NF4Arguments weight = check_nf4(qweight, absmax, nested_absmax, nested_code, offset,
                                        blocksize, nested_blocksize, out_features, in_features);
  check_device("qweight", qweight, x, name);
  STD_TORCH_CHECK(out_features > 0 && in_features > 0, "qweight must hold elements, got shape [",
                  out_features, ", ", in_features, "]");
  STD_TORCH_CHECK(weight.matrix.numel() < kMaxSmallElements, "qweight must hold fewer than ",
                  kMaxSmallElements, " elements, got ", weight.matrix.numel());
  STD_TORCH_CHECK(!weight.matrix.nested() || is_power_of_two(nested_blocksize),
                  "nested_blocksize must be a power of two, got ", nested_blocksize);
  check_aligned("qweight", qweight);
  return weight;
}

// No block of absmax may span two rows.
void check_columns(int64_t in_features, int64_t blocksize) {
  STD_TORCH_CHECK(in_features % blocksize == 0, "the weight must have a multiple of blocksize (",
                  blocksize, ") columns, got ", in_features);
}

// x, the base weight and its bias.
LoraLinear to_base(const Tensor& x, const Tensor& qweight, const Tensor& absmax,
                   const std::optional<Tensor>& nested_absmax,
                   const std::optional<Tensor>& nested_code, const std::optional<Tensor>& offset,
                   int64_t blocksize, int64_t nested_blocksize, int64_t out_features,
                   const std::optional<Tensor>& bias, int64_t most_rows) {
  check_on_cuda("x", x);
  check_matrix("x", x);
  const NF4Arguments weight =
      check_rows("x", x, qweight, absmax, nested_absmax, nested_code, offset, blocksize,
                 nested_blocksize, out_features, x.size(1), most_rows);
  check_aligned("x", x);
  LoraLinear op;
  op.dtype = to_dtype("x", x.scalar_type());
  op.weight = weight.matrix;
  op.offset = weight.offset;
  op.bias = to_vector("bias", bias, out_features, x);
  op.x = x.const_data_ptr();
  op.tokens = static_cast<int>(x.size(0));
  return op;
}

// lora_A, of one adapter or a stack of them, whose shape has been checked.
void set_lora_A(LoraHidden& hidden, const Tensor& x, const Tensor& lora_A, int64_t rank) {
  STD_TORCH_CHECK(rank >= 1 && rank <= kMaxSmallRank, "lora_A must have 1 to ", kMaxSmallRank,
                  " rows (the rank), got ", rank);
  check_device("lora_A", lora_A, x, "x");
  check_aligned("lora_A", lora_A);
  hidden.dtype = to_dtype("lora_A", lora_A.scalar_type());
  STD_TORCH_CHECK(hidden.dtype == DType::kFloat32 || lora_A.scalar_type() == x.scalar_type(),
                  "lora_A must have x's dtype or Float, got ",
                  torch::headeronly::toString(lora_A.scalar_type()));
  hidden.rank = static_cast<int>(rank);
  hidden.lora_A = lora_A.const_data_ptr();
}

void set_lora_B(LoraLinear& op, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B) {
  check_dtype("lora_B", lora_B, lora_A.scalar_type());
  check_device("lora_B", lora_B, x, "x");
  op.lora_B = lora_B.const_data_ptr();
}

void set_hidden(LoraHidden& hidden, const Tensor& x, const Tensor& lora_A,
                const std::optional<Tensor>& lora_A_bias, double scaling, double dropout_p,
                const std::optional<Tensor>& seed, StringHandle activation) {
  check_matrix("lora_A", lora_A);
  const int64_t rank = lora_A.size(0);
  check_matrix("lora_A", lora_A, rank, x.size(1));
  set_lora_A(hidden, x, lora_A, rank);
  if (lora_A_bias.has_value()) check_dtype("lora_A_bias", *lora_A_bias, lora_A.scalar_type());
  hidden.lora_A_bias = to_vector("lora_A_bias", lora_A_bias, rank, x).data;
  hidden.scaling = static_cast<float>(scaling);
  hidden.activation = to_activation(activation);
  const Tensor* drawn_from = check_dropout(dropout_p, seed);
  if (drawn_from == nullptr) return;
  check_device("seed", *drawn_from, x, "x");
  hidden.seed = drawn_from->const_data_ptr<int64_t>();
  hidden.threshold = drop_threshold(dropout_p);
  hidden.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
}

void set_lora(LoraLinear& op, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B,
              const std::optional<Tensor>& lora_A_bias, const std::optional<Tensor>& lora_B_bias,
              double scaling, double dropout_p, const std::optional<Tensor>& seed,
              StringHandle activation) {
  set_hidden(op.hidden, x, lora_A, lora_A_bias, scaling, dropout_p, seed, activation);
  check_matrix("lora_B", lora_B, op.weight.rows, lora_A.size(0));
  set_lora_B(op, x, lora_A, lora_B);
  op.lora_B_bias = to_vector("lora_B_bias", lora_B_bias, op.weight.rows, x);
}

void set_adapters(LoraLinear& op, const Tensor& x, const Tensor& lora_A, const Tensor& lora_B,
                  const Tensor& adapter_ids, const Tensor& scalings) {
  check_stack("lora_A", lora_A);
  const int64_t count = lora_A.size(0), rank = lora_A.size(1);
  check_stack("lora_A", lora_A, count, rank, op.weight.cols);
  check_stack("lora_B", lora_B, count, op.weight.rows, rank);
  STD_TORCH_CHECK(count <= INT32_MAX, "lora_A must hold fewer than 2^31 adapters, got ", count);
  set_lora_A(op.hidden, x, lora_A, rank);
  set_lora_B(op, x, lora_A, lora_B);
  check_dtype("adapter_ids", adapter_ids, ScalarType::Long);
  check_contiguous("adapter_ids", adapter_ids);
  check_numel("adapter_ids", adapter_ids, op.tokens, "one for every row of x");
  check_device("adapter_ids", adapter_ids, x, "x");
  check_dtype("scalings", scalings, ScalarType::Float);
  check_contiguous("scalings", scalings);
  check_numel("scalings", scalings, count, "one for every adapter");
  check_device("scalings", scalings, x, "x");
  op.hidden.adapters = {adapter_ids.const_data_ptr<int64_t>(), scalings.const_data_ptr<float>(),
                        static_cast<int>(count)};
}

DeviceLimits current_limits(const char* name) {
  DeviceLimits limits;
  check_cuda_call(name, device_limits(&limits));
  return limits;
}

void check_shared_memory(const char* name, const SmallPlan& plan, const DeviceLimits& limits) {
  STD_TORCH_CHECK(plan.shared_bytes <= limits.shared_per_cta, name, " needs ", plan.shared_bytes,
                  " bytes of shared memory, this GPU gives ", limits.shared_per_cta);
}

// y; the launch takes what else it needs from the caching allocator, so that calls on different
// streams and in CUDA graphs keep apart. make_plan(op, limits) gives the plan.
template <class MakePlan>
Tensor run_small(const char* name, const LoraLinear& base, const Tensor& x,
                 const MakePlan& make_plan) {
  LoraLinearSmall op;
  static_cast<LoraLinear&>(op) = base;
  const int64_t rows = op.weight.rows;
  check_columns(op.weight.cols, op.weight.blocksize);
  Tensor y = torch::stable::new_empty(x, {op.tokens, rows});
  if (op.tokens == 0) return y;
  const DeviceLimits limits = current_limits(name);
  const SmallPlan plan = make_plan(op, limits);
  check_shared_memory(name, plan, limits);
  const int64_t low = static_cast<int64_t>(op.tokens) * op.hidden.rank;
  const int64_t partials = plan.partial_floats(op.tokens, rows);
  Tensor workspace =
      torch::stable::new_empty(x, {low + partials + plan.counters()}, ScalarType::Float);
  op.hidden.low = workspace.mutable_data_ptr<float>();
  op.partials = op.hidden.low + low;
  op.counters = reinterpret_cast<unsigned*>(op.partials + partials);
  op.y = y.mutable_data_ptr();
  check_cuda_call(name, lora_linear_small_cuda(op, plan, limits.dependent_launch,
                                               current_stream(x.get_device_index())));
  return y;
}

// The same for many tokens.
template <class MakePlan>
Tensor run_hopper(const char* name, const LoraLinear& base, const Tensor& x,
                  const MakePlan& make_plan) {
  LoraLinearHopper op;
  static_cast<LoraLinear&>(op) = base;
  const NF4Matrix& weight = op.weight;
  STD_TORCH_CHECK(weight.cols % kHopperColumns == 0, "x must have a multiple of ", kHopperColumns,
                  " columns, got ", weight.cols);
  STD_TORCH_CHECK(weight.blocksize % kHopperColumns == 0, "blocksize must be a multiple of ",
                  kHopperColumns, ", got ", weight.blocksize);
  Tensor y = torch::stable::new_empty(x, {op.tokens, weight.rows});
  if (op.tokens == 0) return y;
  const DeviceLimits limits = current_limits(name);
  STD_TORCH_CHECK(limits.major == 9 && limits.minor == 0, name,
                  " needs a GPU of compute capability 9.0, got ", limits.major, ".", limits.minor);
  const HopperPlan plan = make_plan(op, limits);
  const int64_t low = op.tokens * low_pitch(op.hidden.rank);  // a multiple of 16 bytes
  const int64_t partials = plan.partial_floats();
  Tensor workspace =
      torch::stable::new_empty(x, {low + partials + plan.counters()}, ScalarType::Float);
  op.hidden.low = workspace.mutable_data_ptr<float>();
  op.partials = op.hidden.low + low;
  op.counters = reinterpret_cast<unsigned*>(op.partials + partials);
  op.y = y.mutable_data_ptr();
  check_cuda_call(name, nf4_linear_hopper_cuda(op, plan, current_stream(x.get_device_index())));
  return y;
}

// How a call is run, the plan of the rule, and the most tokens it takes at a blocksize.
struct FewTokens {
  static int64_t most(int64_t blocksize) {
    return blocksize == 32 ? kMaxSmallTokensOfBlock32 : kMaxSmallTokens;
  }
  static SmallPlan plan(const LoraLinear& op, const DeviceLimits& limits) {
    return plan_small(op.tokens, op.weight.rows, op.weight.cols, limits);
  }
  static int64_t first(const SmallPlan& plan) { return plan.output_warps; }
  template <class MakePlan>
  static Tensor run(const char* name, const LoraLinear& op, const Tensor& x,
                    const MakePlan& make_plan) {
    return run_small(name, op, x, make_plan);
  }
};
struct ManyTokens {
  static int64_t most(int64_t) { return kMaxManyTokens; }
  static HopperPlan plan(const LoraLinear& op, const DeviceLimits& limits) {
    return plan_hopper(op.tokens, op.weight.rows, op.weight.cols, limits.processors);
  }
  static int64_t first(const HopperPlan& plan) { return plan.tile_tokens; }
  template <class MakePlan>
  static Tensor run(const char* name, const LoraLinear& op, const Tensor& x,
                    const MakePlan& make_plan) {
    return run_hopper(name, op, x, make_plan);
  }
};

// The same with a plan that a caller has chosen, for measurements: the first number is the warps
// beside each other here, and the tokens of a tile for many tokens.
struct ChosenFewTokens : FewTokens {
  static SmallPlan chosen(const LoraLinear& op, const DeviceLimits& limits, int64_t output_warps,
                          int64_t slices, int64_t grid) {
    SmallPlan plan;
    const char* wrong = choose_small({output_warps, slices, grid}, op.tokens, op.weight.rows,
                                     op.weight.cols, limits, &plan);
    STD_TORCH_CHECK(wrong == nullptr, "the kernel cannot run this plan: ", wrong,
                    "; got output_warps ", output_warps, ", slices ", slices, ", grid ", grid);
    return plan;
  }
};
struct ChosenManyTokens : ManyTokens {
  static HopperPlan chosen(const LoraLinear& op, const DeviceLimits&, int64_t tile_tokens,
                           int64_t slices, int64_t grid) {
    HopperPlan plan;
    const char* wrong = choose_hopper({tile_tokens, slices, grid}, op.tokens, op.weight.rows,
                                      op.weight.cols, &plan);
    STD_TORCH_CHECK(wrong == nullptr, "the kernel cannot run this plan: ", wrong,
                    "; got tile_tokens ", tile_tokens, ", slices ", slices, ", grid ", grid);
    return plan;
  }
};

template <class Tokens, class MakePlan>
std::tuple<Tensor, Tensor> run_lora(const char* name, LoraLinear& op, const Tensor& x,
                                    const MakePlan& make_plan) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor h = torch::stable::new_empty(x, {x.size(0), op.hidden.rank}, ScalarType::Float);
  op.hidden.h = h.mutable_data_ptr<float>();
  return {Tokens::run(name, op, x, make_plan), h};
}

template <class Tokens>
Tensor nf4_linear_cuda(const Tensor& x, const Tensor& qweight, const Tensor& absmax,
                       const std::optional<Tensor>& nested_absmax,
                       const std::optional<Tensor>& nested_code,
                       const std::optional<Tensor>& offset, int64_t blocksize,
                       int64_t nested_blocksize, int64_t out_features,
                       const std::optional<Tensor>& bias) {
  LoraLinear op = to_base(x, qweight, absmax, nested_absmax, nested_code, offset, blocksize,
                          nested_blocksize, out_features, bias, Tokens::most(blocksize));
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  return Tokens::run("nf4_linear", op, x, Tokens::plan);
}

Tensor nf4_linear_backward_cuda(const Tensor& grad, const Tensor& qweight, const Tensor& absmax,
                                const std::optional<Tensor>& nested_absmax,
                                const std::optional<Tensor>& nested_code,
                                const std::optional<Tensor>& offset, int64_t blocksize,
                                int64_t nested_blocksize, int64_t in_features) {
  static constexpr const char* kName = "nf4_linear_backward";
  check_on_cuda("grad", grad);
  check_matrix("grad", grad);
  STD_TORCH_CHECK(blocksize != 32, "blocksize must be 64 or more, got 32");
  const NF4Arguments weight =
      check_rows("grad", grad, qweight, absmax, nested_absmax, nested_code, offset, blocksize,
                 nested_blocksize, grad.size(1), in_features, kMaxSmallTokens);
  check_columns(in_features, blocksize);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  LinearBackwardSmall op;
  op.dtype = to_dtype("grad", grad.scalar_type());
  op.grad = grad.const_data_ptr();
  op.tokens = static_cast<int>(grad.size(0));
  op.weight = weight.matrix;
  op.offset = weight.offset;
  Tensor dx = torch::stable::new_empty(grad, {op.tokens, in_features});
  if (op.tokens == 0) return dx;
  const DeviceLimits limits = current_limits(kName);
  const SmallPlan plan = plan_small_backward(op.tokens, op.weight.rows, in_features, limits);
  check_shared_memory(kName, plan, limits);
  const int64_t partials = plan.partial_floats(op.tokens, in_features);
  Tensor workspace =
      torch::stable::new_empty(grad, {partials + plan.counters()}, ScalarType::Float);
  op.partials = workspace.mutable_data_ptr<float>();
  op.counters = reinterpret_cast<unsigned*>(op.partials + partials);
  op.dx = dx.mutable_data_ptr();
  check_cuda_call(
      kName, nf4_linear_backward_small_cuda(op, plan, current_stream(grad.get_device_index())));
  return dx;
}

template <class Tokens>
LoraLinear to_lora(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& absmax,
                   const std::optional<Tensor>& nested_absmax,
                   const std::optional<Tensor>& nested_code, const std::optional<Tensor>& offset,
                   int64_t blocksize, int64_t nested_blocksize, int64_t out_features,
                   const Tensor& lora_A, const Tensor& lora_B, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& lora_A_bias,
                   const std::optional<Tensor>& lora_B_bias, double scaling, double dropout_p,
                   const std::optional<Tensor>& seed, StringHandle activation) {
  STD_TORCH_CHECK(absmax.has_value(), "absmax must be given: this op takes NF4 weights only");
  LoraLinear op = to_base(x, weight, *absmax, nested_absmax, nested_code, offset, blocksize,
                          nested_blocksize, out_features, bias, Tokens::most(blocksize));
  set_lora(op, x, lora_A, lora_B, lora_A_bias, lora_B_bias, scaling, dropout_p, seed, activation);
  return op;
}

template <class Tokens>
std::tuple<Tensor, Tensor> lora_linear_cuda(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& absmax,
    const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
    const std::optional<Tensor>& offset, int64_t blocksize, int64_t nested_blocksize,
    int64_t out_features, const Tensor& lora_A, const Tensor& lora_B,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& lora_A_bias,
    const std::optional<Tensor>& lora_B_bias, double scaling, double dropout_p,
    const std::optional<Tensor>& seed, StringHandle activation) {
  LoraLinear op = to_lora<Tokens>(x, weight, absmax, nested_absmax, nested_code, offset, blocksize,
                                  nested_blocksize, out_features, lora_A, lora_B, bias, lora_A_bias,
                                  lora_B_bias, scaling, dropout_p, seed, activation);
  return run_lora<Tokens>("lora_linear", op, x, Tokens::plan);
}

// lora_linear with a plan of the caller's choice; Tokens is one of the Chosen ones.
template <class Tokens>
std::tuple<Tensor, Tensor> lora_linear_planned(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& absmax,
    const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
    const std::optional<Tensor>& offset, int64_t blocksize, int64_t nested_blocksize,
    int64_t out_features, const Tensor& lora_A, const Tensor& lora_B,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& lora_A_bias,
    const std::optional<Tensor>& lora_B_bias, double scaling, double dropout_p,
    const std::optional<Tensor>& seed, StringHandle activation, int64_t first, int64_t slices,
    int64_t grid) {
  LoraLinear op = to_lora<Tokens>(x, weight, absmax, nested_absmax, nested_code, offset, blocksize,
                                  nested_blocksize, out_features, lora_A, lora_B, bias, lora_A_bias,
                                  lora_B_bias, scaling, dropout_p, seed, activation);
  return run_lora<Tokens>("lora_linear", op, x,
                          [&](const LoraLinear& of, const DeviceLimits& limits) {
                            return Tokens::chosen(of, limits, first, slices, grid);
                          });
}

// The rule's plans on x's device, in the numbers that a caller may choose.
template <class Tokens>
std::tuple<int64_t, int64_t, int64_t> rule_plan(const Tensor& x, int64_t out_features) {
  check_on_cuda("x", x);
  check_matrix("x", x);
  STD_TORCH_CHECK(x.size(0) > 0 && out_features > 0 && x.size(1) >= kHopperColumns,
                  "a plan needs rows of x with ", kHopperColumns,
                  " columns or more and outputs, got ", to_string(x.sizes()), " and ",
                  out_features);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  LoraLinear op;
  op.tokens = static_cast<int>(x.size(0));
  op.weight.rows = out_features;
  op.weight.cols = x.size(1);
  const auto plan = Tokens::plan(op, current_limits("rule_plan"));
  return {Tokens::first(plan), plan.slices, plan.grid};
}

// ([x | scaling * act(h) | 0], of whole vectors a row; h)
std::tuple<Tensor, Tensor> lora_extend(const Tensor& x, const Tensor& lora_A,
                                       const std::optional<Tensor>& lora_A_bias, double scaling,
                                       double dropout_p, const std::optional<Tensor>& seed,
                                       StringHandle activation) {
  check_on_cuda("x", x);
  check_matrix("x", x);
  check_not_fp32("x", x);
  check_aligned("x", x);
  const int64_t tokens = x.size(0), cols = x.size(1);
  STD_TORCH_CHECK(tokens <= kMaxManyTokens, "x must have at most ", kMaxManyTokens, " rows, got ",
                  tokens);
  STD_TORCH_CHECK(cols % kManyColumns == 0, "x must have a multiple of ", kManyColumns,
                  " columns, got ", cols);
  check_dtype("lora_A", lora_A, x.scalar_type());
  LoraHidden op;
  set_hidden(op, x, lora_A, lora_A_bias, scaling, dropout_p, seed, activation);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor wide = torch::stable::new_empty(x, {tokens, wide_cols(cols, op.rank)});
  Tensor h = torch::stable::new_empty(x, {tokens, op.rank}, ScalarType::Float);
  if (tokens == 0) return {wide, h};
  op.h = h.mutable_data_ptr<float>();
  check_cuda_call("lora_extend",
                  lora_extend_cuda(op, x.const_data_ptr(), static_cast<int>(tokens), cols,
                                   wide.mutable_data_ptr(), current_stream(x.get_device_index())));
  return {wide, h};
}

std::tuple<Tensor, Tensor> multi_lora_linear_cuda(
    const Tensor& x, const Tensor& qweight, const Tensor& absmax,
    const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
    const std::optional<Tensor>& offset, int64_t blocksize, int64_t nested_blocksize,
    int64_t out_features, const Tensor& lora_A, const Tensor& lora_B, const Tensor& adapter_ids,
    const Tensor& scalings, const std::optional<Tensor>& bias) {
  LoraLinear op = to_base(x, qweight, absmax, nested_absmax, nested_code, offset, blocksize,
                          nested_blocksize, out_features, bias, FewTokens::most(blocksize));
  set_adapters(op, x, lora_A, lora_B, adapter_ids, scalings);
  return run_lora<FewTokens>("multi_lora_linear", op, x, FewTokens::plan);
}

}  // namespace
}  // namespace pylora::cuda

STABLE_TORCH_LIBRARY_IMPL(pylora_C, CUDA, m) {
  using pylora::cuda::ChosenFewTokens;
  using pylora::cuda::ChosenManyTokens;
  using pylora::cuda::FewTokens;
  using pylora::cuda::ManyTokens;
  m.impl("nf4_linear", TORCH_BOX(&pylora::cuda::nf4_linear_cuda<FewTokens>));
  m.impl("nf4_linear_hopper", TORCH_BOX(&pylora::cuda::nf4_linear_cuda<ManyTokens>));
  m.impl("nf4_linear_backward", TORCH_BOX(&pylora::cuda::nf4_linear_backward_cuda));
  m.impl("lora_linear", TORCH_BOX(&pylora::cuda::lora_linear_cuda<FewTokens>));
  m.impl("lora_linear_hopper", TORCH_BOX(&pylora::cuda::lora_linear_cuda<ManyTokens>));
  m.impl("lora_linear_planned", TORCH_BOX(&pylora::cuda::lora_linear_planned<ChosenFewTokens>));
  m.impl("lora_linear_hopper_planned",
         TORCH_BOX(&pylora::cuda::lora_linear_planned<ChosenManyTokens>));
  m.impl("lora_linear_plan", TORCH_BOX(&pylora::cuda::rule_plan<FewTokens>));
  m.impl("lora_linear_hopper_plan", TORCH_BOX(&pylora::cuda::rule_plan<ManyTokens>));
  m.impl("lora_extend", TORCH_BOX(&pylora::cuda::lora_extend));
  m.impl("multi_lora_linear", TORCH_BOX(&pylora::cuda::multi_lora_linear_cuda));
}
