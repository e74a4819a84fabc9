// Threads for the CPU kernels, without torch headers. bind.cpp forwards to torch's own thread pool:
// torch.set_num_threads() then governs pylora too, and no second pool competes for the cores.
#pragma once

#include <cstdint>

namespace pylora::cpu {

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);

// Cuts [begin, end) into at most num_threads() ranges of at least `grain` items, runs the body on
// each, and returns when all are done. The body must not throw. A call from inside a parallel
// region runs on the calling thread.
void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);

int num_threads();

// parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { ... });
template <class Body>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  parallel_ranges(
      begin, end, grain,
      [](int64_t first, int64_t last, void* context) {
        (*static_cast<const Body*>(context))(first, last);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace pylora::cpu
