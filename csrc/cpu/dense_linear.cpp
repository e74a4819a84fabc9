#include "cpu/dense_linear.h"

#include "cpu/cpu_features.h"

namespace pylora::cpu {

void dense_linear(const DenseLinearArgs& args) {
  if (args.tokens == 0 || args.weight.rows == 0) return;
#if defined(__x86_64__)
  const CpuIsa isa = cpu_isa();
  if (isa >= CpuIsa::kAvx512Bf16 && args.dtype == DType::kBFloat16) {
    return dense_linear_avx512_bf16(args);
  }
  if (isa >= CpuIsa::kAvx512) return dense_linear_avx512(args);
  if (isa >= CpuIsa::kAvx2) return dense_linear_avx2(args);
#endif
  dense_linear_portable(args);
}

}  // namespace pylora::cpu
