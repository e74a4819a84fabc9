// What the async proxy of sm_90 (copies by TMA, operands of wgmma) sees of a CTA's shared memory.
//
// It has a path of its own to shared memory. What a thread writes with an ordinary store becomes
// visible there if the thread executes fence.proxy.async after the store, and a barrier then orders
// the two. Here every byte has the value that the async proxy sees and, if an ordinary store has
// replaced it, the thread whose fence is missing. Stores are known from the wrappers of ptx.cuh
// (store_shared, stmatrix, cp.async). A plain store is invisible until its bytes differ from those
// that the async proxy sees: then nobody knows who must fence, and that is an error of its own.
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

  // An ordinary store of a thread, after it. One to static shared memory does not matter here.
  void store(unsigned thread, const void* pointer, size_t bytes) {
    if (!contains(pointer, bytes)) return;
    const size_t first = offset_of(pointer);
    for (size_t i = first; i < first + bytes; ++i) unfenced_[i] = static_cast<uint16_t>(thread);
    if (stores_.size() <= thread) stores_.resize(thread + 1);
    stores_[thread].push_back({first, bytes});
  }

  // fence.proxy.async of a thread.
  void fence(unsigned thread) {
    ++report.async_fences;
    if (stores_.size() <= thread) return;
    for (const Range& range : stores_[thread]) {
      for (size_t i = range.first; i < range.first + range.bytes; ++i) {
        if (unfenced_[i] != thread) continue;  // another has written there since
        unfenced_[i] = kNobody;
        seen_[i] = memory_[i];
      }
    }
    stores_[thread].clear();
  }

  // The async proxy is about to read.
  void read(const char* operation, const void* pointer, size_t bytes) {
    ++report.async_reads;
    require(pointer, bytes);
    check(operation, "reads", offset_of(pointer), bytes);
  }
  // It may write from now on. Two stores to one place through different proxies need the fence as
  // well.
  void start_write(const char* operation, const void* pointer, size_t bytes) {
    ++report.async_writes;
    require(pointer, bytes);
    check(operation, "writes over", offset_of(pointer), bytes);
  }
  // It has written.
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
  std::vector<std::vector<Range>> stores_;  // of a thread since its last fence
};

}  // namespace host_cuda
