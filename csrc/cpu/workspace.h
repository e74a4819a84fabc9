// Scratch memory of the calling thread, kept between calls: to map and fault in fresh pages at each
// call would cost more than a small matrix product.
#pragma once

#include <cstddef>

namespace pylora::cpu {

inline constexpr size_t kWorkspaceBytes = size_t{2} << 20;

// kWorkspaceBytes of memory, aligned to a page; the same for every call from one thread. A kernel
// that holds it must not call another that takes it.
float* thread_workspace();

}  // namespace pylora::cpu
