// GPU side of the linear ops: tensor -> checks -> stream -> launcher. Weights are NF4 here;
// nf4_linear and lora_linear take few tokens, their _hopper twins many on sm_90a, and
// pylora/backends/cuda.py sends everything else elsewhere.
#include <optional>
#include <tuple>

#include "common/boxed.h"
#include "cuda/bind.h"
#include "cuda/hopper/lora_linear.cuh"
#include "cuda/many_rows/lora_shrink.cuh"
#include "cuda/small_m/lora_linear.cuh"
#include "cuda/small_m/nf4_linear_backward.cuh"

namespace pylora::cuda {
namespace {

// Contiguous tensors alone.
void make_aligned(Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  if (address % kAlignment != 0) tensor = torch::stable::clone(tensor);
}

bool is_power_of_two(int64_t value) { return value > 0 && (value & (value - 1)) == 0; }

TypedVector to_vector(const char* name, std::optional<Tensor>& vector, int64_t size,
                      const Rows& x) {
  if (!vector.has_value()) return {};
  check_vector(name, *vector, size, x);
  return {vector->const_data_ptr(), to_dtype(name, vector->scalar_type())};
}

void check_not_fp32(const Rows& x) {
  STD_TORCH_CHECK(x.dtype() != DType::kFloat32, x.name, " must be float16 or bfloat16, got Float");
}

// The weight that x or grad meets.
NF4Arguments check_weight(NF4Tensors& weight, const Rows& x, int64_t out_features,
                          int64_t in_features, int64_t most_rows) {
  check_on_cuda(x.name, x.tensor);
  check_not_fp32(x);
  STD_TORCH_CHECK(x.count <= most_rows, x.name, " must have at most ", most_rows,
                  " rows if blocksize is ", weight.blocksize, ", got ", x.count);
  NF4Arguments arguments = weight.check(out_features, in_features);
  check_device("qweight", weight.qweight, x.tensor, x.name);
  STD_TORCH_CHECK(out_features > 0 && in_features > 0, "qweight must hold elements, got shape [",
                  out_features, ", ", in_features, "]");
  STD_TORCH_CHECK(arguments.matrix.numel() < kMaxElements, "qweight must hold fewer than ",
                  kMaxElements, " elements, got ", arguments.matrix.numel());
  STD_TORCH_CHECK(!arguments.matrix.nested() || is_power_of_two(weight.nested_blocksize),
                  "nested_blocksize must be a power of two, got ", weight.nested_blocksize);
  make_aligned(weight.qweight);
  arguments.matrix.qweight = weight.qweight.const_data_ptr<uint8_t>();
  return arguments;
}

// No block of absmax may span two rows.
void check_columns(int64_t in_features, int64_t blocksize) {
  STD_TORCH_CHECK(in_features % blocksize == 0, "the weight must have a multiple of blocksize (",
                  blocksize, ") columns, got ", in_features);
}

// x, the base weight and its bias.
LoraLinearArgs to_base(Rows& x, NF4Tensors& weight, int64_t out_features,
                       std::optional<Tensor>& bias, int64_t most_rows) {
  const NF4Arguments arguments = check_weight(weight, x, out_features, x.cols, most_rows);
  make_aligned(x.tensor);
  LoraLinearArgs op;
  op.dtype = x.dtype();
  op.weight = arguments.matrix;
  op.offset = arguments.offset;
  op.bias = to_vector("bias", bias, out_features, x);
  op.x = x.tensor.const_data_ptr();
  op.tokens = static_cast<int>(x.count);
  return op;
}

// lora_A, of one adapter or a stack of them.
template <size_t kDims>
void set_lora_A(LoraShrinkArgs& hidden, const Rows& x, Tensor& lora_A,
                const int64_t (&sizes)[kDims]) {
  const ScalarType type = lora_A.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == x.tensor.scalar_type(),
                  "lora_A must have x's dtype or Float, got ", torch::headeronly::toString(type));
  check_factor("lora_A", lora_A, sizes, type, x);
  make_aligned(lora_A);
  hidden.dtype = to_dtype("lora_A", type);
  hidden.rank = static_cast<int>(sizes[kDims - 2]);
  hidden.lora_A = lora_A.const_data_ptr();
}

void set_hidden(LoraShrinkArgs& hidden, const Rows& x, Tensor& lora_A,
                std::optional<Tensor>& lora_A_bias, const LowRankOptions& options) {
  const int64_t rank = check_rank(lora_A, 2, kMaxRank);
  set_lora_A(hidden, x, lora_A, {rank, x.cols});
  if (lora_A_bias.has_value()) check_dtype("lora_A_bias", *lora_A_bias, lora_A.scalar_type());
  hidden.lora_A_bias = to_vector("lora_A_bias", lora_A_bias, rank, x).data;
  hidden.scaling = static_cast<float>(options.scaling);
  hidden.activation = options.activation();
  const DropoutArguments dropout = options.dropout(x);
  hidden.seed = dropout.seed;
  hidden.threshold = dropout.threshold;
  hidden.keep_scale = dropout.keep_scale;
}

void set_adapters(LoraLinearArgs& op, const Rows& x, Tensor& lora_A, Tensor& lora_B,
                  Tensor& adapter_ids, Tensor& scalings) {
  const int64_t rank = check_rank(lora_A, 3, kMaxRank), count = lora_A.size(0);
  STD_TORCH_CHECK(count <= INT32_MAX, "lora_A must hold fewer than 2^31 adapters, got ", count);
  set_lora_A(op.shrink, x, lora_A, {count, rank, op.weight.cols});
  check_factor("lora_B", lora_B, {count, op.weight.rows, rank}, lora_A.scalar_type(), x);
  op.lora_B = lora_B.const_data_ptr();
  check_dtype("adapter_ids", adapter_ids, ScalarType::Long);
  check_numel("adapter_ids", adapter_ids, x.count, "one for every row of x");
  check_device("adapter_ids", adapter_ids, x.tensor, x.name);
  make_contiguous(adapter_ids);
  check_dtype("scalings", scalings, ScalarType::Float);
  check_numel("scalings", scalings, count, "one for every adapter");
  check_device("scalings", scalings, x.tensor, x.name);
  make_contiguous(scalings);
  op.shrink.adapters = {adapter_ids.const_data_ptr<int64_t>(), scalings.const_data_ptr<float>(),
                        static_cast<int>(count)};
}

DeviceLimits current_limits(const char* name) {
  DeviceLimits limits;
  check_cuda_call(name, device_limits(&limits));
  return limits;
}

void check_shared_memory(const char* name, const SmallMPlan& plan, const DeviceLimits& limits) {
  STD_TORCH_CHECK(plan.shared_bytes <= limits.shared_per_cta, name, " needs ", plan.shared_bytes,
                  " bytes of shared memory, this GPU gives ", limits.shared_per_cta);
}

// What a launch needs besides, from the caching allocator: calls on different streams and in CUDA
// graphs keep apart.
struct Workspace {
  Workspace(const Rows& x, int64_t low_floats, int64_t partial_floats, int64_t count)
      : memory(torch::stable::new_empty(x.tensor, {low_floats + partial_floats + count},
                                        ScalarType::Float)),
        low(memory.mutable_data_ptr<float>()),
        partials(low + low_floats),
        counters(reinterpret_cast<unsigned*>(partials + partial_floats)) {}

  Tensor memory;
  float* low;
  float* partials;
  unsigned* counters;
};

// How few tokens are run: the most at a blocksize, the plan of the rule, and a call with the plan
// of make_plan(op, limits), whose y may have no rows.
struct FewTokens {
  static int64_t most(int64_t blocksize) {
    return blocksize == 32 ? kMaxSmallMBlock32 : kMaxSmallM;
  }
  static SmallMPlan plan(const LoraLinearArgs& op, const DeviceLimits& limits) {
    return plan_small_m(op.tokens, op.weight.rows, op.weight.cols, limits);
  }
  static int64_t first(const SmallMPlan& plan) { return plan.output_warps; }

  template <class MakePlan>
  static Tensor run(const char* name, const LoraLinearArgs& base, const Rows& x,
                    const MakePlan& make_plan) {
    const int64_t rows = base.weight.rows;
    check_columns(base.weight.cols, base.weight.blocksize);
    Tensor y = x.new_rows(rows);
    if (x.count == 0) return y;
    const DeviceLimits limits = current_limits(name);
    const SmallMPlan plan = make_plan(base, limits);
    check_shared_memory(name, plan, limits);
    const Workspace space(x, x.count * base.shrink.rank, plan.partial_floats(x.count, rows),
                          plan.counters());
    LoraLinearSmallMArgs op{base, space.partials, space.counters};
    op.shrink.low = space.low;
    op.y = y.mutable_data_ptr();
    check_cuda_call(name, lora_linear_small_m_cuda(op, plan, limits.dependent_launch,
                                                   current_stream(x.tensor.get_device_index())));
    return y;
  }
};

// The same for many tokens.
struct ManyTokens {
  static int64_t most(int64_t) { return kMaxM; }
  static HopperPlan plan(const LoraLinearArgs& op, const DeviceLimits& limits) {
    return plan_hopper(op.tokens, op.weight.rows, op.weight.cols, limits.processors);
  }
  static int64_t first(const HopperPlan& plan) { return plan.tile_tokens; }

  template <class MakePlan>
  static Tensor run(const char* name, const LoraLinearArgs& base, const Rows& x,
                    const MakePlan& make_plan) {
    const NF4Matrix& weight = base.weight;
    STD_TORCH_CHECK(weight.cols % kHopperColumns == 0, "x must have a multiple of ", kHopperColumns,
                    " columns, got ", weight.cols);
    STD_TORCH_CHECK(weight.blocksize % kHopperColumns == 0, "blocksize must be a multiple of ",
                    kHopperColumns, ", got ", weight.blocksize);
    Tensor y = x.new_rows(weight.rows);
    if (x.count == 0) return y;
    const DeviceLimits limits = current_limits(name);
    STD_TORCH_CHECK(limits.major == 9 && limits.minor == 0, name,
                    " needs a GPU of compute capability 9.0, got ", limits.major, ".",
                    limits.minor);
    const HopperPlan plan = make_plan(base, limits);
    // low is a multiple of 16 bytes, so that the partial sums are aligned as well.
    const Workspace space(x, x.count * low_pitch(base.shrink.rank), plan.partial_floats(),
                          plan.counters());
    LoraLinearHopperArgs op{base, space.partials, space.counters};
    op.shrink.low = space.low;
    op.y = y.mutable_data_ptr();
    check_cuda_call(name,
                    lora_linear_hopper_cuda(op, plan, current_stream(x.tensor.get_device_index())));
    return y;
  }
};

// The same with a plan that a caller has chosen, for measurements: the first number is the warps
// beside each other here, and the tokens of a tile for many tokens.
struct ChosenFewTokens : FewTokens {
  static SmallMPlan chosen(const LoraLinearArgs& op, const DeviceLimits& limits,
                           int64_t output_warps, int64_t slices, int64_t grid) {
    SmallMPlan plan;
    const char* wrong = choose_small_m({output_warps, slices, grid}, op.tokens, op.weight.rows,
                                       op.weight.cols, limits, &plan);
    STD_TORCH_CHECK(wrong == nullptr, "the kernel cannot run this plan: ", wrong,
                    "; got output_warps ", output_warps, ", splits ", slices, ", grid ", grid);
    return plan;
  }
};
struct ChosenManyTokens : ManyTokens {
  static HopperPlan chosen(const LoraLinearArgs& op, const DeviceLimits&, int64_t tile_tokens,
                           int64_t slices, int64_t grid) {
    HopperPlan plan;
    const char* wrong = choose_hopper({tile_tokens, slices, grid}, op.tokens, op.weight.rows,
                                      op.weight.cols, &plan);
    STD_TORCH_CHECK(wrong == nullptr, "the kernel cannot run this plan: ", wrong,
                    "; got tile_tokens ", tile_tokens, ", splits ", slices, ", grid ", grid);
    return plan;
  }
};

template <class Tokens, class MakePlan>
std::tuple<Tensor, Tensor> run_lora(const char* name, LoraLinearArgs& op, const Rows& x,
                                    const MakePlan& make_plan) {
  const Device device(x.tensor);
  Tensor h = x.new_rows(op.shrink.rank, ScalarType::Float);
  op.shrink.h = h.mutable_data_ptr<float>();
  return {Tokens::run(name, op, x, make_plan), h};
}

template <class Tokens>
Tensor nf4_linear_cuda(const Tensor& given_x, NF4Tensors& weight, int64_t out_features,
                       std::optional<Tensor>& bias) {
  Rows x("x", given_x);
  const LoraLinearArgs op = to_base(x, weight, out_features, bias, Tokens::most(weight.blocksize));
  const Device device(x.tensor);
  return Tokens::run("nf4_linear", op, x, Tokens::plan);
}

Tensor nf4_linear_backward_cuda(const Tensor& given_grad, NF4Tensors& weight, int64_t in_features) {
  static constexpr const char* kName = "nf4_linear_backward";
  STD_TORCH_CHECK(weight.blocksize != 32, "blocksize must be 64 or more, got 32");
  const Rows grad("grad", given_grad);
  const NF4Arguments arguments = check_weight(weight, grad, grad.cols, in_features, kMaxSmallM);
  check_columns(in_features, weight.blocksize);
  const Device device(grad.tensor);
  NF4LinearBackwardSmallMArgs op;
  op.dtype = grad.dtype();
  op.grad = grad.tensor.const_data_ptr();
  op.tokens = static_cast<int>(grad.count);
  op.weight = arguments.matrix;
  op.offset = arguments.offset;
  Tensor dx = grad.new_rows(in_features);
  if (op.tokens == 0) return dx;
  const DeviceLimits limits = current_limits(kName);
  const SmallMPlan plan = plan_small_m_backward(op.tokens, op.weight.rows, in_features, limits);
  check_shared_memory(kName, plan, limits);
  const Workspace space(grad, 0, plan.partial_floats(grad.count, in_features), plan.counters());
  op.partials = space.partials;
  op.counters = space.counters;
  op.dx = dx.mutable_data_ptr();
  check_cuda_call(kName, nf4_linear_backward_small_m_cuda(op, plan, device.stream()));
  return dx;
}

template <class Tokens>
LoraLinearArgs to_lora(Rows& x, NF4Tensors& weight, int64_t out_features, LowRankTensors& low) {
  LoraLinearArgs op = to_base(x, weight, out_features, low.bias, Tokens::most(weight.blocksize));
  set_hidden(op.shrink, x, low.lora_A, low.lora_A_bias, low.options);
  const int64_t rank = op.shrink.rank;
  check_factor("lora_B", low.lora_B, {out_features, rank}, low.lora_A.scalar_type(), x);
  op.lora_B = low.lora_B.const_data_ptr();
  op.lora_B_bias = to_vector("lora_B_bias", low.lora_B_bias, out_features, x);
  return op;
}

template <class Tokens>
std::tuple<Tensor, Tensor> lora_linear_cuda(const Tensor& given_x, NF4Tensors& weight,
                                            int64_t out_features, LowRankTensors& low) {
  Rows x("x", given_x);
  LoraLinearArgs op = to_lora<Tokens>(x, weight, out_features, low);
  return run_lora<Tokens>("lora_linear", op, x, Tokens::plan);
}

// lora_linear with a plan of the caller's choice; Tokens is one of the Chosen ones.
template <class Tokens>
std::tuple<Tensor, Tensor> lora_linear_planned(const Tensor& given_x, NF4Tensors& weight,
                                               int64_t out_features, LowRankTensors& low,
                                               int64_t first, int64_t slices, int64_t grid) {
  Rows x("x", given_x);
  LoraLinearArgs op = to_lora<Tokens>(x, weight, out_features, low);
  return run_lora<Tokens>("lora_linear", op, x,
                          [&](const LoraLinearArgs& of, const DeviceLimits& limits) {
                            return Tokens::chosen(of, limits, first, slices, grid);
                          });
}

// The rule's plans on x's device, in the numbers that a caller may choose.
template <class Tokens>
std::tuple<int64_t, int64_t, int64_t> rule_plan(const Tensor& given_x, int64_t out_features) {
  const Rows x("x", given_x);
  check_on_cuda("x", x.tensor);
  STD_TORCH_CHECK(x.count > 0 && x.count <= kMaxM && out_features > 0 && x.cols >= kHopperColumns,
                  "a plan needs 1 to ", kMaxM, " rows of x with ", kHopperColumns,
                  " columns or more and outputs, got ", to_string(x.shape), " and ", out_features);
  const Device device(x.tensor);
  LoraLinearArgs op;
  op.tokens = static_cast<int>(x.count);
  op.weight.rows = out_features;
  op.weight.cols = x.cols;
  const auto plan = Tokens::plan(op, current_limits("rule_plan"));
  return {Tokens::first(plan), plan.splits, plan.grid};
}

// ([x | scaling * act(h) | 0], of whole vectors a row; h)
std::tuple<Tensor, Tensor> lora_extend(const Tensor& given_x, Tensor& lora_A,
                                       std::optional<Tensor>& lora_A_bias,
                                       const LowRankOptions& options) {
  Rows x("x", given_x);
  check_on_cuda("x", x.tensor);
  check_not_fp32(x);
  make_aligned(x.tensor);
  STD_TORCH_CHECK(x.count <= kMaxM, "x must have at most ", kMaxM, " rows, got ", x.count);
  STD_TORCH_CHECK(x.cols % kManyRowsColumns == 0, "x must have a multiple of ", kManyRowsColumns,
                  " columns, got ", x.cols);
  check_dtype("lora_A", lora_A, x.tensor.scalar_type());
  LoraShrinkArgs op;
  set_hidden(op, x, lora_A, lora_A_bias, options);
  const Device device(x.tensor);
  Tensor wide = x.new_rows(wide_cols(x.cols, op.rank));
  Tensor h = x.new_rows(op.rank, ScalarType::Float);
  if (x.count == 0) return {wide, h};
  op.h = h.mutable_data_ptr<float>();
  check_cuda_call("lora_extend",
                  lora_extend_cuda(op, x.tensor.const_data_ptr(), static_cast<int>(x.count), x.cols,
                                   wide.mutable_data_ptr(), device.stream()));
  return {wide, h};
}

std::tuple<Tensor, Tensor> multi_lora_linear_cuda(const Tensor& given_x, NF4Tensors& weight,
                                                  int64_t out_features, Tensor& lora_A,
                                                  Tensor& lora_B, Tensor& adapter_ids,
                                                  Tensor& scalings, std::optional<Tensor>& bias) {
  Rows x("x", given_x);
  LoraLinearArgs op = to_base(x, weight, out_features, bias, FewTokens::most(weight.blocksize));
  set_adapters(op, x, lora_A, lora_B, adapter_ids, scalings);
  return run_lora<FewTokens>("multi_lora_linear", op, x, FewTokens::plan);
}

}  // namespace
}  // namespace pylora::cuda

STABLE_TORCH_LIBRARY_IMPL(pylora_C, CUDA, m) {
  using pylora::boxed;
  using pylora::cuda::ChosenFewTokens;
  using pylora::cuda::ChosenManyTokens;
  using pylora::cuda::FewTokens;
  using pylora::cuda::ManyTokens;
  m.impl("nf4_linear", boxed<pylora::cuda::nf4_linear_cuda<FewTokens>>);
  m.impl("nf4_linear_hopper", boxed<pylora::cuda::nf4_linear_cuda<ManyTokens>>);
  m.impl("nf4_linear_backward", boxed<pylora::cuda::nf4_linear_backward_cuda>);
  m.impl("lora_linear", boxed<pylora::cuda::lora_linear_cuda<FewTokens>>);
  m.impl("lora_linear_hopper", boxed<pylora::cuda::lora_linear_cuda<ManyTokens>>);
  m.impl("lora_linear_planned", boxed<pylora::cuda::lora_linear_planned<ChosenFewTokens>>);
  m.impl("lora_linear_hopper_planned", boxed<pylora::cuda::lora_linear_planned<ChosenManyTokens>>);
  m.impl("lora_linear_plan", boxed<pylora::cuda::rule_plan<FewTokens>>);
  m.impl("lora_linear_hopper_plan", boxed<pylora::cuda::rule_plan<ManyTokens>>);
  m.impl("lora_extend", boxed<pylora::cuda::lora_extend>);
  m.impl("multi_lora_linear", boxed<pylora::cuda::multi_lora_linear_cuda>);
}
