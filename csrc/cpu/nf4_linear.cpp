#include "cpu/nf4_linear.h"

#include "cpu/cpu_features.h"

namespace pylora::cpu {

void run_linear(const LinearProblem& problem) {
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  const bool bf16 = problem.dtype == DType::kBFloat16;
  if (isa == CpuIsa::kAmx && bf16) return run_linear_amx(problem);
  if (isa == CpuIsa::kAmxEmulated && bf16) return run_linear_amx_emulated(problem);
  if (isa >= CpuIsa::kAvx512Bf16 && bf16) return run_linear_avx512_bf16(problem);
  if (isa >= CpuIsa::kAvx512) return run_linear_avx512(problem);
  if (isa >= CpuIsa::kAvx2) return run_linear_avx2(problem);
#endif
  run_linear_portable(problem);
}

}  // namespace pylora::cpu
