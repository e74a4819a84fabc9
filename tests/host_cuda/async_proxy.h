// Tracks what the async proxy of sm_90 (copies by TMA, operands of wgmma) sees of a CTA's shared
// memory.
//
// The async proxy reaches shared memory by its own path. It sees what a thread has written with an
// ordinary store only if the thread then executes fence.proxy.async and a barrier follows. Here
// every byte has the value that the async proxy sees. If an ordinary store has replaced that value,
// the byte also has the number of the thread whose fence is missing. The wrappers of ptx.cuh
// (store_shared, stmatrix, cp.async) report their stores. A plain store is not reported and is only
// noticed if its bytes differ from those that the async proxy sees. Which thread must fence is then
// unknown, so the error is another one.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "report.h"

namespace host_cuda {

class AsyncProxy {
 public:
  AsyncProxy(const uint8_t* memory, size_t bytes)
      : memory_(memory), seen_(memory, memory + bytes), unfenced_(bytes, kNobody) {}

  // Called after an ordinary store of a thread. A store to static shared memory does not matter.
  void store(unsigned thread, const void* pointer, size_t bytes) {
    if (!contains(pointer, bytes)) return;
    const size_t first = offset_of(pointer);
    for (size_t i = first; i < first + bytes; ++i) unfenced_[i] = static_cast<uint16_t>(thread);
    if (stores_.size() <= thread) stores_.resize(thread + 1);
    stores_[thread].push_back({first, bytes});
  }

  // Called for a thread's fence.proxy.async.
  void fence(unsigned thread) {
    ++report.async_fences;
    if (stores_.size() <= thread) return;
    for (const Range& range : stores_[thread]) {
      for (size_t i = range.first; i < range.first + range.bytes; ++i) {
        if (unfenced_[i] != thread) continue;  // another thread has written there since
        unfenced_[i] = kNobody;
        seen_[i] = memory_[i];
      }
    }
    stores_[thread].clear();
  }

  // Called before the async proxy reads.
  void read(const char* operation, const void* pointer, size_t bytes) {
    ++report.async_reads;
    require(pointer, bytes);
    check(operation, "reads", offset_of(pointer), bytes);
  }
  // Called before the async proxy may write. A fence is also needed between two stores to one place
  // through different proxies.
  void start_write(const char* operation, const void* pointer, size_t bytes) {
    ++report.async_writes;
    require(pointer, bytes);
    check(operation, "writes over", offset_of(pointer), bytes);
  }
  // Called after the async proxy has written.
  void written(const void* pointer, size_t bytes) {
    require(pointer, bytes);
    const size_t first = offset_of(pointer);
    std::memcpy(seen_.data() + first, pointer, bytes);
  }

 private:
  static constexpr uint16_t kNobody = 0xFFFF;
  struct Range {
    size_t first, bytes;
  };

  size_t offset_of(const void* pointer) const {
    return reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(memory_);
  }
  bool contains(const void* pointer, size_t bytes) const {
    return offset_of(pointer) < seen_.size() && bytes <= seen_.size() - offset_of(pointer);
  }
  void require(const void* pointer, size_t bytes) const {
    if (contains(pointer, bytes)) return;
    std::fprintf(stderr, "host_cuda: the async proxy leaves dynamic shared memory\n");
    std::abort();
  }

  void check(const char* operation, const char* does, size_t first, size_t bytes) const {
    for (size_t i = first; i < first + bytes; ++i) {
      if (unfenced_[i] == kNobody && seen_[i] == memory_[i]) continue;
      std::fprintf(stderr, "host_cuda: %s %s byte %zu of shared memory, which ", operation, does,
                   i);
      if (unfenced_[i] != kNobody) {
        std::fprintf(stderr, "thread %u has written without a fence.proxy.async after it\n",
                     unsigned{unfenced_[i]});
      } else {
        std::fprintf(stderr,
                     "a plain store has written: only store_shared() says whose "
                     "fence.proxy.async must follow\n");
      }
      std::abort();
    }
  }

  const uint8_t* memory_;
  std::vector<uint8_t> seen_;
  std::vector<uint16_t> unfenced_;          // the thread whose fence is missing
  std::vector<std::vector<Range>> stores_;  // each thread's stores since its last fence
};

}  // namespace host_cuda
