#include "cpu/nf4_linear.h"

#include "cpu/kernel_table.h"

namespace pylora::cpu {
namespace {

constexpr KernelTable<RunLinear> kRunLinear{
    run_linear_portable,
    PYLORA_X86_KERNEL(run_linear_avx2),
    PYLORA_X86_KERNEL(run_linear_avx512),
    PYLORA_X86_KERNEL(run_linear_avx512_bf16),
    PYLORA_X86_KERNEL(run_linear_amx_emulated),
    PYLORA_X86_KERNEL(run_linear_amx),
};

}  // namespace

void run_linear(const NF4LinearArgs& args) {
  kRunLinear.choose(args.dtype == DType::kBFloat16)(args);
}

}  // namespace pylora::cpu
