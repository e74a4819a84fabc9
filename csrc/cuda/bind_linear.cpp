// GPU side of the linear ops: tensor -> checks -> stream -> launcher. Weights are NF4 here.
// pylora/backends/cuda.py says which calls take which kernel.
#include <optional>
#include <tuple>

#include "common/boxed.h"
#include "common/prepared.h"
#include "cuda/bind.h"
#include "cuda/hopper/lora_linear.cuh"
#include "cuda/many_rows/lora_shrink.cuh"
#include "cuda/small_m/lora_linear.cuh"
#include "cuda/small_m/nf4_linear_backward.cuh"

namespace pylora::cuda {
namespace {

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kAlignment == 0; }

// For contiguous tensors.
void make_aligned(Tensor& tensor) {
  if (!is_aligned(tensor.const_data_ptr())) tensor = torch::stable::clone(tensor);
}

void make_aligned(Tokens& x) {
  if (is_aligned(x.data)) return;
  STD_TORCH_CHECK(x.data == x.tensor.const_data_ptr(), x.name, " must be aligned to ", kAlignment,
                  " bytes");
  x.tensor = torch::stable::clone(x.tensor);
  x.data = x.tensor.const_data_ptr();
}

TypedVector to_vector(const char* name, std::optional<Tensor>& vector, int64_t size,
                      const Tokens& x) {
  if (!vector.has_value()) return {};
  check_vector(name, *vector, size, x);
  return {vector->const_data_ptr(), to_dtype(name, vector->scalar_type())};
}

void check_input(const Tokens& x, int64_t most) {
  check_on_cuda(x.name, x.tensor);
  STD_TORCH_CHECK(x.dtype() != DType::kFloat32, x.name, " must be float16 or bfloat16, got Float");
  STD_TORCH_CHECK(x.count <= most, x.name, " must have at most ", most, " tokens, got ", x.count);
}

// The weight that x or grad meets.
NF4Arguments check_weight(NF4Tensors& weight, const Tokens& x, int64_t out_features,
                          int64_t in_features) {
  NF4Arguments arguments = weight.check(out_features, in_features);
  const NF4Matrix& matrix = arguments.matrix;
  check_device("qweight", weight.qweight, x.tensor, x.name);
  STD_TORCH_CHECK(out_features > 0 && in_features > 0, "qweight must hold elements, got shape [",
                  out_features, ", ", in_features, "]");
  STD_TORCH_CHECK(matrix.numel() < kMaxElements, "qweight must hold fewer than ", kMaxElements,
                  " elements, got ", matrix.numel());
  const int64_t group = matrix.nested() ? weight.nested_blocksize : 1;
  STD_TORCH_CHECK((group & (group - 1)) == 0, "nested_blocksize must be a power of two, got ",
                  group);
  make_aligned(weight.qweight);
  arguments.matrix.qweight = weight.qweight.const_data_ptr<uint8_t>();
  return arguments;
}

// The small-M kernels take no block of absmax that spans two rows of the weight.
void check_whole_blocks(const NF4Matrix& weight) {
  STD_TORCH_CHECK(weight.cols % weight.blocksize == 0,
                  "the weight must have a multiple of blocksize (", weight.blocksize,
                  ") columns, got ", weight.cols);
}

DeviceLimits current_limits(const char* op) {
  DeviceLimits limits;
  check_cuda_call(op, device_limits(&limits));
  return limits;
}

void check_shared_memory(const char* op, const SmallMPlan& plan, const DeviceLimits& limits) {
  STD_TORCH_CHECK(plan.shared_bytes <= limits.shared_per_cta, op, " needs ", plan.shared_bytes,
                  " bytes of shared memory, this GPU gives ", limits.shared_per_cta);
}

// What a launch needs besides, from the caching allocator: calls on different streams and in CUDA
// graphs keep apart.
struct Workspace {
  Workspace(const Tokens& x, int64_t low_floats, int64_t partial_floats, int64_t count)
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

// The numbers that a caller may choose in place of the rule's plan, to measure others. They are all
// 0 if the rule decides. The first is the output warps of a small-M CTA, or the tokens of a Hopper
// tile.
struct Choice {
  using Fields = std::tuple<int64_t, int64_t, int64_t>;
  int64_t first = 0, splits = 0, grid = 0;

  bool made() const { return first != 0 || splits != 0 || grid != 0; }
  void check(const char* why_not) const {
    STD_TORCH_CHECK(why_not == nullptr, "the kernel cannot run this plan: ", why_not, "; got ",
                    first, " (output warps, or tokens of a tile), splits ", splits, ", grid ",
                    grid);
  }
};

// The small-M kernel: what it takes, its plan and its launch.
struct SmallM {
  static int64_t most_tokens(int64_t blocksize) {
    return blocksize == 32 ? kMaxSmallMBlock32 : kMaxSmallM;
  }
  static void check(const LoraLinearArgs& args) { check_whole_blocks(args.weight); }
  static SmallMPlan plan(const LoraLinearArgs& args, const DeviceLimits& limits,
                         const Choice& choice) {
    const NF4Matrix& weight = args.weight;
    if (!choice.made()) return plan_small_m(args.tokens, weight.rows, weight.cols, limits);
    SmallMPlan plan;
    choice.check(choose_small_m({choice.first, choice.splits, choice.grid}, args.tokens,
                                weight.rows, weight.cols, limits, &plan));
    return plan;
  }
  static int64_t first(const SmallMPlan& plan) { return plan.output_warps; }
  static void launch(const char* op, const LoraLinearArgs& args, const Tokens& x,
                     const SmallMPlan& plan, const DeviceLimits& limits) {
    check_shared_memory(op, plan, limits);
    const Workspace space(x, x.count * args.shrink.rank,
                          plan.partial_floats(x.count, args.weight.rows), plan.counters());
    LoraLinearSmallMArgs kernel{args, space.partials, space.counters};
    kernel.shrink.low = space.low;
    check_cuda_call(op, lora_linear_small_m_cuda(kernel, plan, limits.dependent_launch,
                                                 current_stream(x.tensor.get_device_index())));
  }
};

// The same for the Hopper kernel.
struct Hopper {
  static int64_t most_tokens(int64_t) { return kMaxM; }
  static void check(const LoraLinearArgs& args) {
    const NF4Matrix& weight = args.weight;
    STD_TORCH_CHECK(weight.cols % kHopperColumns == 0, "x must have a multiple of ", kHopperColumns,
                    " columns, got ", weight.cols);
    STD_TORCH_CHECK(weight.blocksize % kHopperColumns == 0, "blocksize must be a multiple of ",
                    kHopperColumns, ", got ", weight.blocksize);
  }
  static HopperPlan plan(const LoraLinearArgs& args, const DeviceLimits& limits,
                         const Choice& choice) {
    const NF4Matrix& weight = args.weight;
    if (!choice.made()) {
      return plan_hopper(args.tokens, weight.rows, weight.cols, limits.processors);
    }
    HopperPlan plan;
    choice.check(choose_hopper({choice.first, choice.splits, choice.grid}, args.tokens, weight.rows,
                               weight.cols, &plan));
    return plan;
  }
  static int64_t first(const HopperPlan& plan) { return plan.tile_tokens; }
  static void launch(const char* op, const LoraLinearArgs& args, const Tokens& x,
                     const HopperPlan& plan, const DeviceLimits& limits) {
    STD_TORCH_CHECK(limits.major == 9 && limits.minor == 0, op,
                    " needs a GPU of compute capability 9.0, got ", limits.major, ".",
                    limits.minor);
    // low is a multiple of 16 bytes, so that the partial sums are aligned as well.
    const Workspace space(x, x.count * low_pitch(args.shrink.rank), plan.partial_floats(),
                          plan.counters());
    LoraLinearHopperArgs kernel{args, space.partials, space.counters};
    kernel.shrink.low = space.low;
    check_cuda_call(
        op, lora_linear_hopper_cuda(kernel, plan, current_stream(x.tensor.get_device_index())));
  }
};

// A checked call of nf4_linear, or of an op with a low-rank part that is added afterwards.
template <class Kernel>
struct Forward {
  Forward(const char* name, Tokens& input, NF4Tensors& weight, int64_t out_features,
          std::optional<Tensor>& bias)
      : op(name), x(input) {
    check_input(x, Kernel::most_tokens(weight.blocksize));
    const NF4Arguments arguments = check_weight(weight, x, out_features, x.cols);
    make_aligned(x);
    args.dtype = x.dtype();
    args.weight = arguments.matrix;
    args.offset = arguments.offset;
    args.bias = to_vector("bias", bias, out_features, x);
    args.x = x.data;
    args.tokens = static_cast<int>(x.count);
    Kernel::check(args);
  }

  void run(void* y, float* h, const Choice& choice = {}) {
    if (x.count == 0) return;
    const Device device(x.tensor);
    args.y = y;
    args.shrink.h = h;
    const DeviceLimits limits = current_limits(op);
    Kernel::launch(op, args, x, Kernel::plan(args, limits, choice), limits);
  }

  // (y, h)
  std::tuple<Tensor, Tensor> run(const Choice& choice = {}) {
    Tensor y = x.new_rows(args.weight.rows);
    Tensor h = x.new_rows(args.shrink.rank, ScalarType::Float);
    run(y.mutable_data_ptr(), h.mutable_data_ptr<float>(), choice);
    return {y, h};
  }

  const char* op;
  Tokens& x;
  LoraLinearArgs args;
};

// lora_A, of one adapter or a stack of them.
template <size_t kDims>
void set_lora_A(LoraShrinkArgs& args, const Tokens& x, Tensor& lora_A,
                const int64_t (&sizes)[kDims]) {
  const ScalarType type = lora_A.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == x.tensor.scalar_type(),
                  "lora_A must have x's dtype or Float, got ", torch::headeronly::toString(type));
  check_factor("lora_A", lora_A, sizes, type, x);
  make_aligned(lora_A);
  args.dtype = to_dtype("lora_A", type);
  args.rank = static_cast<int>(sizes[kDims - 2]);
  args.lora_A = lora_A.const_data_ptr();
}

void set_shrink(LoraShrinkArgs& args, const Tokens& x, Tensor& lora_A,
                std::optional<Tensor>& lora_A_bias, const LowRankOptions& options) {
  const int64_t rank = check_rank(lora_A, 2, kMaxRank);
  set_lora_A(args, x, lora_A, {rank, x.cols});
  if (lora_A_bias.has_value()) check_dtype("lora_A_bias", *lora_A_bias, lora_A.scalar_type());
  args.lora_A_bias = to_vector("lora_A_bias", lora_A_bias, rank, x).data;
  args.scaling = static_cast<float>(options.scaling);
  args.activation = options.activation();
  const DropoutArguments dropout = options.dropout(x);
  args.seed = dropout.seed;
  args.threshold = dropout.threshold;
  args.keep_scale = dropout.keep_scale;
}

// A checked call of lora_linear.
template <class Kernel>
struct LoraForward : Forward<Kernel> {
  LoraForward(Tokens& x, NF4Tensors& weight, int64_t out_features, LowRankTensors& low)
      : Forward<Kernel>("lora_linear", x, weight, out_features, low.bias) {
    LoraLinearArgs& args = this->args;
    set_shrink(args.shrink, x, low.lora_A, low.lora_A_bias, low.options);
    const int64_t rank = args.shrink.rank;
    check_factor("lora_B", low.lora_B, {out_features, rank}, low.lora_A.scalar_type(), x);
    args.lora_B = low.lora_B.const_data_ptr();
    args.lora_B_bias = to_vector("lora_B_bias", low.lora_B_bias, out_features, x);
  }
};

template <class Kernel>
Tensor nf4_linear_cuda(const Tensor& given_x, NF4Tensors& weight, int64_t out_features,
                       std::optional<Tensor>& bias) {
  Tokens x("x", given_x);
  Forward<Kernel> forward("nf4_linear", x, weight, out_features, bias);
  Tensor y = x.new_rows(out_features);
  forward.run(y.mutable_data_ptr(), nullptr);
  return y;
}

template <class Kernel>
void nf4_linear_prepared(Tokens& x, const PreparedCall& call, NF4Tensors& weight,
                         int64_t& out_features, std::optional<Tensor>& bias) {
  Forward<Kernel>("nf4_linear", x, weight, out_features, bias).run(call.y, nullptr);
}

template <class Kernel>
std::tuple<Tensor, Tensor> lora_linear_cuda(const Tensor& given_x, NF4Tensors& weight,
                                            int64_t out_features, LowRankTensors& low) {
  Tokens x("x", given_x);
  return LoraForward<Kernel>(x, weight, out_features, low).run();
}

template <class Kernel>
void lora_linear_prepared(Tokens& x, const PreparedCall& call, NF4Tensors& weight,
                          int64_t& out_features, LowRankTensors& low) {
  low.options.take(call);
  LoraForward<Kernel> forward(x, weight, out_features, low);
  const int64_t unwanted = call.h == nullptr ? x.count * forward.args.shrink.rank : 0;
  Tensor h = torch::stable::new_empty(x.tensor, {unwanted}, ScalarType::Float);
  forward.run(call.y, call.h == nullptr ? h.mutable_data_ptr<float>() : call.h);
}

template <class Kernel>
std::tuple<Tensor, Tensor> lora_linear_planned(const Tensor& given_x, NF4Tensors& weight,
                                               int64_t out_features, LowRankTensors& low,
                                               const Choice& choice) {
  Tokens x("x", given_x);
  return LoraForward<Kernel>(x, weight, out_features, low).run(choice);
}

// The rule's plan on x's device, in the numbers of a Choice.
template <class Kernel>
std::tuple<int64_t, int64_t, int64_t> rule_plan(const Tensor& given_x, int64_t out_features) {
  const Tokens x("x", given_x);
  check_on_cuda("x", x.tensor);
  STD_TORCH_CHECK(x.count > 0 && x.count <= kMaxM && out_features > 0 && x.cols >= kHopperColumns,
                  "a plan needs 1 to ", kMaxM, " tokens in x with ", kHopperColumns,
                  " columns or more and outputs, got ", to_string(x.shape), " and ", out_features);
  const Device device(x.tensor);
  LoraLinearArgs args;
  args.tokens = static_cast<int>(x.count);
  args.weight.rows = out_features;
  args.weight.cols = x.cols;
  const auto plan = Kernel::plan(args, current_limits("rule_plan"), {});
  return {Kernel::first(plan), plan.splits, plan.grid};
}

Tensor nf4_linear_backward_cuda(const Tensor& given_grad, NF4Tensors& weight, int64_t in_features) {
  static constexpr const char* kName = "nf4_linear_backward";
  STD_TORCH_CHECK(weight.blocksize != 32, "blocksize must be 64 or more, got 32");
  const Tokens grad("grad", given_grad);
  check_input(grad, kMaxSmallM);
  const NF4Arguments arguments = check_weight(weight, grad, grad.cols, in_features);
  check_whole_blocks(arguments.matrix);
  const Device device(grad.tensor);
  NF4LinearBackwardSmallMArgs args;
  args.dtype = grad.dtype();
  args.grad = grad.data;
  args.tokens = static_cast<int>(grad.count);
  args.weight = arguments.matrix;
  args.offset = arguments.offset;
  Tensor dx = grad.new_rows(in_features);
  if (args.tokens == 0) return dx;
  const DeviceLimits limits = current_limits(kName);
  const SmallMPlan plan = plan_small_m_backward(args.tokens, args.weight.rows, in_features, limits);
  check_shared_memory(kName, plan, limits);
  const Workspace space(grad, 0, plan.partial_floats(grad.count, in_features), plan.counters());
  args.partials = space.partials;
  args.counters = space.counters;
  args.dx = dx.mutable_data_ptr();
  check_cuda_call(kName, nf4_linear_backward_small_m_cuda(args, plan, device.stream()));
  return dx;
}

// ([x | scaling * act(h) | 0], whose rows are whole vectors; h)
std::tuple<Tensor, Tensor> lora_extend(const Tensor& given_x, Tensor& lora_A,
                                       std::optional<Tensor>& lora_A_bias,
                                       const LowRankOptions& options) {
  Tokens x("x", given_x);
  check_input(x, kMaxM);
  make_aligned(x);
  STD_TORCH_CHECK(x.cols % kManyRowsColumns == 0, "x must have a multiple of ", kManyRowsColumns,
                  " columns, got ", x.cols);
  check_dtype("lora_A", lora_A, x.tensor.scalar_type());
  LoraShrinkArgs args;
  set_shrink(args, x, lora_A, lora_A_bias, options);
  const Device device(x.tensor);
  Tensor wide = x.new_rows(wide_cols(x.cols, args.rank));
  Tensor h = x.new_rows(args.rank, ScalarType::Float);
  if (x.count == 0) return {wide, h};
  args.h = h.mutable_data_ptr<float>();
  check_cuda_call("lora_extend", lora_extend_cuda(args, x.data, static_cast<int>(x.count), x.cols,
                                                  wide.mutable_data_ptr(), device.stream()));
  return {wide, h};
}

std::tuple<Tensor, Tensor> multi_lora_linear_cuda(const Tensor& given_x, NF4Tensors& weight,
                                                  int64_t out_features, Tensor& lora_A,
                                                  Tensor& lora_B, Tensor& adapter_ids,
                                                  Tensor& scalings, std::optional<Tensor>& bias) {
  Tokens x("x", given_x);
  Forward<SmallM> forward("multi_lora_linear", x, weight, out_features, bias);
  LoraLinearArgs& args = forward.args;
  const int64_t rank = check_rank(lora_A, 3, kMaxRank), count = lora_A.size(0);
  STD_TORCH_CHECK(count <= INT32_MAX, "lora_A must hold fewer than 2^31 adapters, got ", count);
  set_lora_A(args.shrink, x, lora_A, {count, rank, x.cols});
  check_factor("lora_B", lora_B, {count, out_features, rank}, lora_A.scalar_type(), x);
  args.lora_B = lora_B.const_data_ptr();
  check_values("adapter_ids", adapter_ids, ScalarType::Long, x.count, "one for every token", x);
  check_values("scalings", scalings, ScalarType::Float, count, "one for every adapter", x);
  args.shrink.adapters = {adapter_ids.const_data_ptr<int64_t>(), scalings.const_data_ptr<float>(),
                          static_cast<int>(count)};
  return forward.run();
}

}  // namespace
}  // namespace pylora::cuda

STABLE_TORCH_LIBRARY_IMPL(pylora_C, CUDA, m) {
  using namespace pylora::cuda;
  using pylora::boxed;
  using pylora::Prepared;
  m.impl("nf4_linear", boxed<nf4_linear_cuda<SmallM>>);
  m.impl("nf4_linear_hopper", boxed<nf4_linear_cuda<Hopper>>);
  m.impl("nf4_linear_backward", boxed<nf4_linear_backward_cuda>);
  m.impl("prepare_nf4_linear", boxed<Prepared<nf4_linear_prepared<SmallM>>::make>);
  m.impl("prepare_nf4_linear_hopper", boxed<Prepared<nf4_linear_prepared<Hopper>>::make>);
  m.impl("lora_linear", boxed<lora_linear_cuda<SmallM>>);
  m.impl("lora_linear_hopper", boxed<lora_linear_cuda<Hopper>>);
  m.impl("prepare_lora_linear", boxed<Prepared<lora_linear_prepared<SmallM>>::make>);
  m.impl("prepare_lora_linear_hopper", boxed<Prepared<lora_linear_prepared<Hopper>>::make>);
  m.impl("lora_linear_planned", boxed<lora_linear_planned<SmallM>>);
  m.impl("lora_linear_hopper_planned", boxed<lora_linear_planned<Hopper>>);
  m.impl("lora_linear_plan", boxed<rule_plan<SmallM>>);
  m.impl("lora_linear_hopper_plan", boxed<rule_plan<Hopper>>);
  m.impl("lora_extend", boxed<lora_extend>);
  m.impl("multi_lora_linear", boxed<multi_lora_linear_cuda>);
}
