// What this processor can run, and which instruction set the kernels use. Each level includes the
// ones below it. setup.py chooses the compiler flags of a file by the suffix of its name.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace pylora::cpu {

// A level            // the suffix of its files, and what it needs
enum class CpuIsa {
  kPortable,     // _portable.cpp     C++ only
  kAvx2,         // _avx2.cpp         AVX2, FMA, F16C
  kAvx512,       // _avx512.cpp       + AVX-512 F, BW, VL, DQ
  kAvx512Bf16,   // _avx512_bf16.cpp  + AVX-512 BF16, VBMI, VNNI
  kAmxEmulated,  // _avx512_bf16.cpp  the AMX kernels over a twin of the tiles: slow, for tests only
  kAmx,          // _amx.cpp          + AMX TILE and BF16, and permission to use the tiles
};

// The level in use: the fastest that the machine runs, or the one that PYLORA_CPU_ISA names. The
// variable is read at first use. Throws std::runtime_error if its value is unknown or cannot run
// here.
CpuIsa cpu_isa();

bool cpu_can_run(CpuIsa isa);

// Throws std::runtime_error if the name is unknown or the machine cannot run it.
void set_cpu_isa(std::string_view name);

const char* cpu_isa_name(CpuIsa isa);

std::vector<std::string> cpu_isas();      // the levels that this machine can run, lowest first
std::vector<std::string> cpu_features();  // those of the extensions known here that it has

}  // namespace pylora::cpu
