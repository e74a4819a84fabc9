// Runs CUDA threads as fibers on one thread of the CPU, in an order drawn from a seed.
//
// A fiber runs until it waits at a barrier, of its warp or of its CTA; then another that can run
// goes on: any of the warp that has the highest priority. Priorities are drawn anew now and then,
// so that warps run far ahead of each other, as far as barriers let them, and so do the few CTAs
// that are resident together. A result that depends on the order changes with the seed. What a
// barrier is for is part of it: lanes of a warp that meet in different operations, or wait for ones
// that will not come, end the program.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace host_cuda {

inline constexpr unsigned kLanes = 32;
inline constexpr size_t kStackBytes = 256 << 10;
inline constexpr size_t kResidentCtas = 3;
inline constexpr unsigned kTurnsOfAPriority = 256;  // on average

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "host_cuda: %s\n", what);
  std::abort();
}

// Threads that wait for each other: a warp, or a CTA.
struct Barrier {
  unsigned live = 0;                // threads that have not returned
  std::vector<unsigned> waiting;    // fibers
  const char* operation = nullptr;  // what they wait in
};

struct Warp {
  Barrier barrier;
  std::vector<unsigned> ready;  // fibers
  uint32_t priority = 0;
  // What each lane shows the others in an operation of the whole warp.
  struct Lane {
    uint64_t value;
    const void* pointer;
    float a[8], b[4];  // fragments of mma
  } lanes[kLanes];
};

struct Cta {
  dim3 index;
  Barrier barrier;
  std::vector<Warp> warps;
  size_t dynamic_bytes = 0;
  std::unique_ptr<uint8_t, void (*)(void*)> static_memory{nullptr, std::free};
  std::unique_ptr<uint8_t, void (*)(void*)> dynamic_memory{nullptr, std::free};
};

// A copy that has been issued and has not landed.
struct AsyncCopy {
  void* shared;
  const void* global;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<uint8_t[]> stack;
  void* fake_stack = nullptr;  // the address sanitizer's
  Cta* cta = nullptr;
  unsigned thread = 0;
  bool done = true;
  std::vector<std::vector<AsyncCopy>> groups;  // the last one is still open
};

struct Executor {
  std::mt19937 random;
  std::vector<std::unique_ptr<Fiber>> fibers;  // reused from CTA to CTA
  std::vector<Warp*> ready;                    // warps with such fibers
  unsigned running = 0;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::function<void()> kernel;

  Executor() {
    const char* seed = std::getenv("HOST_CUDA_SEED");
    random.seed(seed != nullptr ? static_cast<unsigned>(std::atoi(seed)) : 0u);
  }
  Fiber& current() { return *fibers[running]; }
};

inline Executor executor;

// Memory that nothing has written: 0xFF is NaN in every float, and no small integer. Each block has
// the size asked for, so that the address sanitizer sees a step beyond it.
inline uint8_t* poisoned(size_t bytes, size_t alignment) {
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes) != 0) fail("out of memory");
  std::memset(memory, 0xFF, bytes);
  return static_cast<uint8_t*>(memory);
}

inline Warp& warp_of(unsigned number) {
  Fiber& fiber = *executor.fibers[number];
  return fiber.cta->warps[fiber.thread / kLanes];
}
inline Warp& warp() { return warp_of(executor.running); }
inline unsigned lane() { return executor.current().thread % kLanes; }

inline void to_scheduler(bool forever) {
  Fiber& fiber = executor.current();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(forever ? nullptr : &fiber.fake_stack, executor.scheduler_stack,
                                 executor.scheduler_stack_bytes);
#endif
  swapcontext(&fiber.context, &executor.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &executor.scheduler_stack,
                                  &executor.scheduler_stack_bytes);
#endif
  (void)forever;
}

inline void make_ready(unsigned number) {
  Warp& warp = warp_of(number);
  if (warp.ready.empty()) executor.ready.push_back(&warp);
  warp.ready.push_back(number);
}

// Takes the fiber that runs next.
inline unsigned take_ready() {
  const auto less = [](const Warp* a, const Warp* b) { return a->priority < b->priority; };
  const auto first = std::max_element(executor.ready.begin(), executor.ready.end(), less);
  Warp& warp = **first;
  std::swap(warp.ready[executor.random() % warp.ready.size()], warp.ready.back());
  const unsigned number = warp.ready.back();
  warp.ready.pop_back();
  if (warp.ready.empty()) executor.ready.erase(first);
  const uint32_t draw = executor.random();
  if (draw % kTurnsOfAPriority == 0) warp.priority = executor.random();
  return number;
}

inline void release_if_complete(Barrier& barrier) {
  if (barrier.waiting.empty() || barrier.waiting.size() < barrier.live) return;
  for (const unsigned number : barrier.waiting) make_ready(number);
  barrier.waiting.clear();
}

inline void wait_at(Barrier& barrier, const char* operation) {
  if (!barrier.waiting.empty() && std::strcmp(barrier.operation, operation) != 0) {
    std::fprintf(stderr, "host_cuda: %s meets %s\n", operation, barrier.operation);
    fail("threads of one group are in different operations");
  }
  barrier.operation = operation;
  barrier.waiting.push_back(executor.running);
  release_if_complete(barrier);
  to_scheduler(false);
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &executor.scheduler_stack,
                                  &executor.scheduler_stack_bytes);
#endif
  executor.kernel();
  Fiber& fiber = executor.current();
  fiber.done = true;
  for (Barrier* barrier : {&warp().barrier, &fiber.cta->barrier}) {
    --barrier->live;  // who has returned is waited for no more
    release_if_complete(*barrier);
  }
  to_scheduler(true);
}

inline void start_fiber(unsigned number, Cta* cta, unsigned thread) {
  Fiber& fiber = *executor.fibers[number];
  if (fiber.stack == nullptr) fiber.stack.reset(new uint8_t[kStackBytes]);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack.get(), kStackBytes);  // the one before never returned
#endif
  fiber.fake_stack = nullptr;
  fiber.cta = cta;
  fiber.thread = thread;
  fiber.done = false;
  fiber.groups.assign(1, {});
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  make_ready(number);
}

inline std::unique_ptr<Cta> make_cta(dim3 index, unsigned threads, size_t dynamic_bytes) {
  auto cta = std::make_unique<Cta>();
  cta->index = index;
  cta->dynamic_bytes = dynamic_bytes;
  cta->barrier.live = threads;
  cta->warps.resize((threads + kLanes - 1) / kLanes);
  for (unsigned thread = 0; thread < threads; ++thread) {
    ++cta->warps[thread / kLanes].barrier.live;
  }
  for (Warp& warp : cta->warps) warp.priority = executor.random();
  return cta;
}

inline void resume(unsigned number) {
  executor.running = number;
  threadIdx = {executor.fibers[number]->thread, 0, 0};
  blockIdx = executor.fibers[number]->cta->index;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  Fiber& fiber = *executor.fibers[number];
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackBytes);
#endif
  swapcontext(&executor.scheduler, &executor.fibers[number]->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// Runs `kernel` once for every thread of every CTA. CTAs start in random order, too.
inline void run(dim3 grid, unsigned threads, size_t dynamic_bytes, std::function<void()> kernel) {
  executor.kernel = std::move(kernel);
  blockDim = {threads, 1, 1};
  gridDim = grid;
  std::vector<dim3> to_start;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) to_start.push_back({x, y, 0});
  }
  std::shuffle(to_start.begin(), to_start.end(), executor.random);
  std::vector<std::unique_ptr<Cta>> resident(kResidentCtas);
  while (executor.fibers.size() < kResidentCtas * threads) {
    executor.fibers.push_back(std::make_unique<Fiber>());
  }
  for (;;) {
    for (size_t slot = 0; slot < kResidentCtas; ++slot) {
      if (resident[slot] != nullptr && resident[slot]->barrier.live == 0) resident[slot] = nullptr;
      if (resident[slot] != nullptr || to_start.empty()) continue;
      resident[slot] = make_cta(to_start.back(), threads, dynamic_bytes);
      to_start.pop_back();
      for (unsigned thread = 0; thread < threads; ++thread) {
        start_fiber(static_cast<unsigned>(slot) * threads + thread, resident[slot].get(), thread);
      }
    }
    if (executor.ready.empty()) break;
    resume(take_ready());
  }
  for (const auto& cta : resident) {
    if (cta != nullptr) fail("deadlock: threads wait for others that do not come");
  }
}

}  // namespace host_cuda
