#include "cpu/workspace.h"

#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pylora::cpu {
namespace {

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

}  // namespace

float* thread_workspace() {
  thread_local std::unique_ptr<float, Free> memory;
  if (memory == nullptr) {
    void* fresh = std::aligned_alloc(kWorkspaceBytes, kWorkspaceBytes);
    if (fresh == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // One page means one TLB entry. This is a hint, and a refusal does no harm.
    madvise(fresh, kWorkspaceBytes, MADV_HUGEPAGE);
#endif
    memory.reset(static_cast<float*>(fresh));
  }
  return memory.get();
}

}  // namespace pylora::cpu
