#include "cpu/dropout.h"

#include "cpu/kernel_table.h"

namespace pylora::cpu {
namespace {

constexpr KernelTable<DropElements> kDropElements{
    drop_elements_portable,
    PYLORA_X86_KERNEL(drop_elements_avx2),
    PYLORA_X86_KERNEL(drop_elements_avx512),
};

}  // namespace

void drop_elements(const DropoutArgs& args) { kDropElements.choose(false)(args); }

}  // namespace pylora::cpu
