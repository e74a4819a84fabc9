#include "cpu/workspace.h"

#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pylora::cpu {
namespace {

// Memory in pages of 2 MiB, if the system has any: one page means one TLB entry.
std::unique_ptr<float, FreeMemory> new_pages(size_t bytes) {
  void* fresh = std::aligned_alloc(kWorkspaceBytes, bytes);
  if (fresh == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(fresh, bytes, MADV_HUGEPAGE);  // This is a hint, and a refusal does no harm.
#endif
  return std::unique_ptr<float, FreeMemory>(static_cast<float*>(fresh));
}

}  // namespace

void FreeMemory::operator()(float* memory) const { std::free(memory); }

float* thread_workspace() {
  thread_local std::unique_ptr<float, FreeMemory> memory;
  if (memory == nullptr) memory = new_pages(kWorkspaceBytes);
  return memory.get();
}

CallMemory::CallMemory(size_t floats) {
  thread_local std::unique_ptr<float, FreeMemory> kept;
  thread_local size_t kept_bytes = 0;
  const size_t pages = floats * sizeof(float) / kWorkspaceBytes + 1;
  const size_t bytes = pages * kWorkspaceBytes;
  if (bytes > kKeptBytes) {
    own_ = new_pages(bytes);
    data_ = own_.get();
    return;
  }
  if (bytes > kept_bytes) {
    kept.reset();
    kept_bytes = 0;
    kept = new_pages(bytes);
    kept_bytes = bytes;
  }
  data_ = kept.get();
}

}  // namespace pylora::cpu
