#include "cpu/dense_linear.h"

#include "cpu/kernel_table.h"

namespace pylora::cpu {
namespace {

constexpr KernelTable<RunDense> kDense{
    dense_linear_portable,
    PYLORA_X86_KERNEL(dense_linear_avx2),
    PYLORA_X86_KERNEL(dense_linear_avx512),
    PYLORA_X86_KERNEL(dense_linear_avx512_bf16),
};

}  // namespace

void dense_linear(const DenseLinearArgs& args) {
  if (args.tokens == 0 || args.weight.rows == 0) return;
  kDense.choose(args.dtype == DType::kBFloat16)(args);
}

}  // namespace pylora::cpu
