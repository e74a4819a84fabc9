#include "cpu/bottleneck_adapter.h"

#include <memory>

#include "cpu/cpu_features.h"
#include "cpu/lora_linear.h"

namespace pylora::cpu {
namespace {

AdapterForward* forward_for(CpuIsa isa, bool bf16) {
#if defined(__x86_64__)
  if (isa == CpuIsa::kAmx && bf16) return adapter_forward_amx;
  if (isa == CpuIsa::kAmxEmulated && bf16) return adapter_forward_amx_emulated;
  if (isa >= CpuIsa::kAvx512Bf16 && bf16) return adapter_forward_avx512_bf16;
  if (isa >= CpuIsa::kAvx512) return adapter_forward_avx512;
  if (isa >= CpuIsa::kAvx2) return adapter_forward_avx2;
#endif
  (void)isa, (void)bf16;
  return adapter_forward_portable;
}

AdapterBackward* backward_for(CpuIsa isa, bool bf16) {
#if defined(__x86_64__)
  if (isa == CpuIsa::kAmx && bf16) return adapter_backward_amx;
  if (isa == CpuIsa::kAmxEmulated && bf16) return adapter_backward_amx_emulated;
  if (isa >= CpuIsa::kAvx512Bf16 && bf16) return adapter_backward_avx512_bf16;
  if (isa >= CpuIsa::kAvx512) return adapter_backward_avx512;
  if (isa >= CpuIsa::kAvx2) return adapter_backward_avx2;
#endif
  (void)isa, (void)bf16;
  return adapter_backward_portable;
}

bool all_bf16(const BottleneckArgs& args) {
  return args.dtype == DType::kBFloat16 && args.weight_dtype == DType::kBFloat16;
}

}  // namespace

void bottleneck_adapter(const BottleneckArgs& args) {
  if (args.tokens > 0) forward_for(cpu_isa(), all_bf16(args))(args);
}

void bottleneck_adapter_backward(const BottleneckArgs& args) {
  const CpuIsa isa = cpu_isa();
  const int64_t count = args.tokens * args.size;
  const bool wants_dh = args.dx != nullptr || args.ddown != nullptr || args.ddown_bias != nullptr;

  // 1. low, dh and dx
  std::unique_ptr<float[]> low, dh;
  if (args.dup != nullptr) low = low_rank_buffer(count);
  if (wants_dh) dh = low_rank_buffer(count);
  if (args.tokens > 0 && (low != nullptr || wants_dh)) {
    backward_for(isa, all_bf16(args))(args, low.get(), dh.get());
  }

  // 2. The gradients of the weights. They take one pass over x and one over the gradient.
  if (args.ddown != nullptr) {
    const TokenMatrix x{args.x, args.dtype, args.tokens, args.hidden, {}};
    gather_for(isa, args.dtype, args.weight_dtype)(
        x, dh.get(), {args.ddown, args.weight_dtype, args.size, true}, nullptr);
  }
  if (args.dup != nullptr || args.grad_sums != nullptr) {
    const TokenMatrix grad{args.grad, args.dtype, args.tokens, args.hidden, {}};
    gather_for(isa, args.dtype, args.weight_dtype)(
        grad, low.get(), {args.dup, args.weight_dtype, args.size, false}, args.grad_sums);
  }
  if (args.ddown_bias != nullptr) column_sums(dh.get(), args.tokens, args.size, args.ddown_bias);
}

}  // namespace pylora::cpu
