#include "cpu/dora_linear.h"

#include "cpu/kernel_table.h"

namespace pylora::cpu {
namespace {

constexpr KernelTable<Rescale> kRescale{
    dora_rescale_portable,
    PYLORA_X86_KERNEL(dora_rescale_avx2),
    PYLORA_X86_KERNEL(dora_rescale_avx512),
};

}  // namespace

void dora_rescale(const RescaleArgs& args) { kRescale.choose(false)(args); }

}  // namespace pylora::cpu
