// Scratch memory of the calling thread. It is kept between calls, since mapping fresh pages at each
// call would cost more than a small matrix product.
#pragma once

#include <cstddef>
#include <memory>

namespace pylora::cpu {

inline constexpr size_t kWorkspaceBytes = size_t{2} << 20;

// Returns kWorkspaceBytes of memory, aligned to 2 MiB. Every call from one thread returns the same
// memory, so a kernel that uses it must not call another one that does.
float* thread_workspace();

struct FreeMemory {
  void operator()(float* memory) const;
};

// Memory of any size for one call; all threads of the call may use it. Up to kKeptBytes are kept by
// the thread that makes the call, which must not ask for a second one meanwhile.
class CallMemory {
 public:
  explicit CallMemory(size_t floats);
  float* data() const { return data_; }

 private:
  std::unique_ptr<float, FreeMemory> own_;  // null if the thread keeps the memory
  float* data_;
};

inline constexpr size_t kKeptBytes = size_t{32} << 20;

}  // namespace pylora::cpu
