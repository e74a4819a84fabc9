#include "cpu/nf4_linear.h"

#include "cpu/cpu_features.h"

namespace pylora::cpu {

void run_linear(const NF4LinearArgs& args) {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  const bool bf16 = args.dtype == DType::kBFloat16;
  if (isa == CpuIsa::kAmx && bf16) return run_linear_amx(args);
  if (isa == CpuIsa::kAmxEmulated && bf16) return run_linear_amx_emulated(args);
  if (isa >= CpuIsa::kAvx512Bf16 && bf16) return run_linear_avx512_bf16(args);
  if (isa >= CpuIsa::kAvx512) return run_linear_avx512(args);
  if (isa >= CpuIsa::kAvx2) return run_linear_avx2(args);
#endif
  run_linear_portable(args);
}

}  // namespace pylora::cpu
