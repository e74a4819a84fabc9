// The kernels that do the same work, one for each instruction set, and the choice between them.
#pragma once

#include "cpu/cpu_features.h"

// The address of a kernel that is compiled for x86 alone; null on other processors.
#if defined(__x86_64__)
#define PYLORA_X86_KERNEL(name) &name
#else
#define PYLORA_X86_KERNEL(name) nullptr
#endif

namespace pylora::cpu {

// A kernel is null if there is none for its level. Those from `avx512_bf16` on take only bf16.
template <class Kernel>
struct KernelTable {
  Kernel* portable;
  Kernel* avx2;
  Kernel* avx512;
  Kernel* avx512_bf16 = nullptr;
  Kernel* amx_emulated = nullptr;
  Kernel* amx = nullptr;

  // The kernel of the highest level up to cpu_isa() that has one for these operands. `bf16` says
  // that all of them are bf16.
  Kernel* choose(bool bf16) const {
    const CpuIsa isa = cpu_isa();
    Kernel* chosen = portable;
    const auto consider = [&](CpuIsa level, bool fits, Kernel* kernel) {
      if (kernel != nullptr && fits && isa >= level) chosen = kernel;
    };
    consider(CpuIsa::kAvx2, true, avx2);
    consider(CpuIsa::kAvx512, true, avx512);
    consider(CpuIsa::kAvx512Bf16, bf16, avx512_bf16);
    consider(CpuIsa::kAmxEmulated, bf16, amx_emulated);
    consider(CpuIsa::kAmx, bf16, amx);
    return chosen;
  }
};

}  // namespace pylora::cpu
