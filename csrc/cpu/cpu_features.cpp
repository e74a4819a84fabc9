#include "cpu/cpu_features.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace pylora::cpu {
namespace {

constexpr const char* kVariable = "PYLORA_CPU_ISA";

constexpr std::array<const char*, 6> kIsaNames = {"portable",    "avx2",         "avx512",
                                                  "avx512_bf16", "amx_emulated", "amx"};

#if defined(__x86_64__)

enum Register { kEax, kEbx, kEcx, kEdx };

using Registers = std::array<uint32_t, 4>;

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r{};
  __get_cpuid_count(leaf, subleaf, &r[kEax], &r[kEbx], &r[kEcx], &r[kEdx]);
  return r;
}

// The registers whose state the operating system saves. An extension must not be used if the system
// does not save its registers.
uint64_t saved_state() {
  constexpr uint32_t kOsxsave = 1u << 27;
  if ((cpuid(1, 0)[kEcx] & kOsxsave) == 0) return 0;
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

constexpr uint64_t kYmm = 0x6;          // the SSE and AVX halves
constexpr uint64_t kZmm = kYmm | 0xE0;  // also the mask registers and the AVX-512 halves
constexpr uint64_t kTile = 3ull << 17;  // the tile configuration and data

// Linux gives a process the tile registers on request: they are 8 KiB more to save at every context
// switch.
bool tiles_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct Feature {
  const char* name;
  uint32_t leaf, subleaf;
  Register where;
  int bit;
  uint64_t state;
};

constexpr Feature kFeatures[] = {
    {"fma", 1, 0, kEcx, 12, kYmm},        {"f16c", 1, 0, kEcx, 29, kYmm},
    {"avx2", 7, 0, kEbx, 5, kYmm},        {"avx_vnni", 7, 1, kEax, 4, kYmm},
    {"avx512f", 7, 0, kEbx, 16, kZmm},    {"avx512dq", 7, 0, kEbx, 17, kZmm},
    {"avx512bw", 7, 0, kEbx, 30, kZmm},   {"avx512vl", 7, 0, kEbx, 31, kZmm},
    {"avx512vbmi", 7, 0, kEcx, 1, kZmm},  {"avx512vbmi2", 7, 0, kEcx, 6, kZmm},
    {"avx512vnni", 7, 0, kEcx, 11, kZmm}, {"avx512bf16", 7, 1, kEax, 5, kZmm},
    {"avx512fp16", 7, 0, kEdx, 23, kZmm}, {"amx_tile", 7, 0, kEdx, 24, kTile},
    {"amx_bf16", 7, 0, kEdx, 22, kTile},  {"amx_int8", 7, 0, kEdx, 25, kTile},
};

std::vector<std::string> detect_features() {
  std::vector<std::string> names;
  const uint64_t saved = saved_state();
  for (const Feature& f : kFeatures) {
    if ((saved & f.state) != f.state) continue;
    if ((cpuid(f.leaf, f.subleaf)[f.where] >> f.bit & 1u) == 0) continue;
    if (f.state == kTile && !tiles_permitted()) continue;
    names.emplace_back(f.name);
  }
  return names;
}

#else

std::vector<std::string> detect_features() { return {}; }

#endif

const std::vector<std::string>& features() {
  static const std::vector<std::string> names = detect_features();
  return names;
}

bool has(std::string_view name) {
  for (const std::string& feature : features()) {
    if (feature == name) return true;
  }
  return false;
}

CpuIsa fastest_isa() {
  CpuIsa fastest = CpuIsa::kPortable;
  for (size_t i = 0; i < kIsaNames.size(); ++i) {
    const auto isa = static_cast<CpuIsa>(i);
    if (isa != CpuIsa::kAmxEmulated && cpu_can_run(isa)) fastest = isa;
  }
  return fastest;
}

std::string runnable_names() {
  std::string names;
  for (const std::string& name : cpu_isas()) names += (names.empty() ? "" : ", ") + name;
  return names;
}

// An error message says that `source`, which the user has set, has a wrong value.
CpuIsa parse_isa(std::string_view name, const std::string& source) {
  for (size_t i = 0; i < kIsaNames.size(); ++i) {
    if (name != kIsaNames[i]) continue;
    if (cpu_can_run(static_cast<CpuIsa>(i))) return static_cast<CpuIsa>(i);
    throw std::runtime_error(source + " is \"" + std::string(name) +
                             "\", which this processor cannot run; it must be one of " +
                             runnable_names());
  }
  throw std::runtime_error(source + " is \"" + std::string(name) +
                           "\", which is not an instruction set pylora knows; it must be one of " +
                           runnable_names());
}

constexpr int kUnset = -1;
std::atomic<int> isa_in_use{kUnset};

}  // namespace

bool cpu_can_run(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kPortable:
      return true;
    case CpuIsa::kAvx2:
      return has("avx2") && has("fma") && has("f16c");
    case CpuIsa::kAvx512:
      return cpu_can_run(CpuIsa::kAvx2) && has("avx512f") && has("avx512bw") && has("avx512vl") &&
             has("avx512dq");
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAmxEmulated:
      return cpu_can_run(CpuIsa::kAvx512) && has("avx512bf16") && has("avx512vbmi") &&
             has("avx512vnni");
    case CpuIsa::kAmx:
      return cpu_can_run(CpuIsa::kAvx512Bf16) && has("amx_tile") && has("amx_bf16");
  }
  return false;
}

CpuIsa cpu_isa() {
  int isa = isa_in_use.load(std::memory_order_relaxed);
  if (isa == kUnset) {
    const char* forced = std::getenv(kVariable);
    const bool set = forced != nullptr && *forced != '\0';
    isa = static_cast<int>(set ? parse_isa(forced, kVariable) : fastest_isa());
    isa_in_use.store(isa, std::memory_order_relaxed);
  }
  return static_cast<CpuIsa>(isa);
}

void set_cpu_isa(std::string_view name) {
  isa_in_use.store(static_cast<int>(parse_isa(name, "name")), std::memory_order_relaxed);
}

const char* cpu_isa_name(CpuIsa isa) { return kIsaNames[static_cast<size_t>(isa)]; }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (size_t i = 0; i < kIsaNames.size(); ++i) {
    if (cpu_can_run(static_cast<CpuIsa>(i))) names.emplace_back(kIsaNames[i]);
  }
  return names;
}

std::vector<std::string> cpu_features() { return features(); }

}  // namespace pylora::cpu
