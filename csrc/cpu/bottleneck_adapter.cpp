#include "cpu/bottleneck_adapter.h"

#include <memory>

#include "cpu/kernel_table.h"
#include "cpu/lora_linear.h"

namespace pylora::cpu {
namespace {

constexpr KernelTable<AdapterForward> kForward{
    adapter_forward_portable,
    PYLORA_X86_KERNEL(adapter_forward_avx2),
    PYLORA_X86_KERNEL(adapter_forward_avx512),
    PYLORA_X86_KERNEL(adapter_forward_avx512_bf16),
    PYLORA_X86_KERNEL(adapter_forward_amx_emulated),
    PYLORA_X86_KERNEL(adapter_forward_amx),
};
constexpr KernelTable<AdapterBackward> kBackward{
    adapter_backward_portable,
    PYLORA_X86_KERNEL(adapter_backward_avx2),
    PYLORA_X86_KERNEL(adapter_backward_avx512),
    PYLORA_X86_KERNEL(adapter_backward_avx512_bf16),
    PYLORA_X86_KERNEL(adapter_backward_amx_emulated),
    PYLORA_X86_KERNEL(adapter_backward_amx),
};

bool all_bf16(const BottleneckArgs& args) {
  return args.dtype == DType::kBFloat16 && args.weight_dtype == DType::kBFloat16;
}

// `count` values that are not initialized; null unless they are wanted.
std::unique_ptr<float[]> values_of(DType dtype, int64_t count, bool wanted) {
  if (!wanted) return nullptr;
  const int64_t floats = ceil_div(count * dtype_size(dtype), int64_t{sizeof(float)});
  return std::unique_ptr<float[]>(new float[static_cast<size_t>(floats)]);
}

}  // namespace

void bottleneck_adapter(const BottleneckArgs& args) {
  if (args.tokens > 0) kForward.choose(all_bf16(args))(args);
}

void bottleneck_adapter_backward(const BottleneckArgs& args) {
  const int64_t count = args.tokens * args.size, elements = args.tokens * args.hidden;
  const bool norm_before = args.norm_before.enabled(), norm_after = args.norm_after.enabled();
  const bool of_up = args.dup != nullptr || args.dz_sums != nullptr;
  const int64_t parts = ceil_div(args.tokens, kSumTokens);
  const auto parts_of = [&](const float* sums) {
    return values_of(DType::kFloat32, 2 * parts * args.hidden, sums != nullptr);
  };

  // 1. low, dh and dx
  std::unique_ptr<float[]> low, dh;
  if (args.dup != nullptr) low = low_rank_buffer(count);
  if (args.dx != nullptr || args.ddown != nullptr || args.ddown_bias != nullptr ||
      args.before_sums != nullptr) {
    dh = low_rank_buffer(count);
  }
  const auto n = values_of(args.weight_dtype, elements, norm_before && args.ddown != nullptr);
  const auto dz = values_of(args.weight_dtype, elements, norm_after && of_up);
  const auto before = parts_of(args.before_sums), after = parts_of(args.after_sums);
  const BackwardBuffers buffers{low.get(), dh.get(), n.get(), dz.get(), before.get(), after.get()};
  if (args.tokens > 0 && (low != nullptr || dh != nullptr || dz != nullptr || after != nullptr)) {
    kBackward.choose(all_bf16(args))(args, buffers);
  }

  // 2. The gradients of the weights. They take one pass over n and one over dz.
  if (args.ddown != nullptr) {
    TokenMatrix given{args.x, args.dtype, args.tokens, args.hidden, {}};
    if (norm_before) given = {n.get(), args.weight_dtype, args.tokens, args.hidden, {}};
    gather_for(given.dtype, args.weight_dtype)(
        given, dh.get(), {args.ddown, args.weight_dtype, args.size, true}, nullptr);
  }
  if (of_up) {
    TokenMatrix given{args.grad, args.dtype, args.tokens, args.hidden, args.dropout};
    if (norm_after) given = {dz.get(), args.weight_dtype, args.tokens, args.hidden, {}};
    gather_for(given.dtype, args.weight_dtype)(
        given, low.get(), {args.dup, args.weight_dtype, args.size, false}, args.dz_sums);
  }
  if (args.ddown_bias != nullptr) column_sums(dh.get(), args.tokens, args.size, args.ddown_bias);

  // 3. The gradients of the norms.
  if (before != nullptr) column_sums(before.get(), parts, 2 * args.hidden, args.before_sums);
  if (after != nullptr) column_sums(after.get(), parts, 2 * args.hidden, args.after_sums);
}

}  // namespace pylora::cpu
