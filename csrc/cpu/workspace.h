// Scratch memory of the calling thread. It is kept between calls, since mapping fresh pages at each
// call would cost more than a small matrix product.
#pragma once

#include <cstddef>

namespace pylora::cpu {

inline constexpr size_t kWorkspaceBytes = size_t{2} << 20;

// Returns kWorkspaceBytes of memory, aligned to 2 MiB. Every call from one thread returns the same
// memory, so a kernel that uses it must not call another one that does.
float* thread_workspace();

}  // namespace pylora::cpu
