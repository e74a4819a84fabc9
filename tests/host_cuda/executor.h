// Runs CUDA threads as fibers on one thread of the CPU, in an order drawn from a seed.
//
// A fiber runs until it waits at a barrier of its warp or of its CTA. Then another fiber runs: any
// that can, from the warp with the highest priority. Priorities are drawn anew now and then, so
// that warps and the few CTAs that are resident together run as far ahead of each other as barriers
// let them. A result that depends on the order therefore changes with the seed. A barrier knows its
// operation: the program ends with an error if lanes of a warp meet in different operations, or if
// threads wait for others that never come.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "async_proxy.h"
#include "bank_conflicts.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // those of the fiber that runs

namespace host_cuda {

inline constexpr unsigned kLanes = 32;
inline constexpr size_t kStackBytes = 256 << 10;
inline constexpr size_t kResidentCtas = 3;
inline constexpr unsigned kTurnsOfAPriority = 256;  // the average until it is drawn anew

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "host_cuda: %s\n", what);
  std::abort();
}

// A barrier of threads that wait for each other: those of a warp or of a CTA.
struct Barrier {
  unsigned live = 0;                // threads that have not returned
  std::vector<unsigned> waiting;    // fibers
  const char* operation = nullptr;  // the operation in which they wait
};

struct Warp {
  Barrier barrier;
  std::vector<unsigned> ready;  // fibers
  uint32_t priority = 0;
  WarpAccesses accesses;  // accesses to shared memory
  // What each lane shows the other lanes in an operation of the whole warp.
  struct Lane {
    uint64_t value;
    uint16_t row[8];   // the lane's row in ldmatrix
    float a[8], b[4];  // the lane's fragments in mma
  } lanes[kLanes];
};

struct Grid;

// A copy by sm_90's copy engine that has been issued and has not landed. `land` moves the bytes.
struct BulkCopy {
  void* barrier;  // the mbarrier that counts its bytes
  std::function<void()> land;
};

struct Cta {
  Grid* grid = nullptr;
  dim3 index;
  Barrier barrier;
  std::map<unsigned, Barrier> named_barriers;
  std::map<const void*, std::vector<unsigned>> waiting_at;  // waiting fibers of each mbarrier
  std::vector<BulkCopy> bulk_copies;
  std::vector<Warp> warps;
  std::vector<unsigned> fibers;
  std::unique_ptr<uint8_t, void (*)(void*)> static_memory{nullptr, std::free};
  std::unique_ptr<uint8_t, void (*)(void*)> dynamic_memory{nullptr, std::free};
  size_t static_bytes = 0;
  std::unique_ptr<AsyncProxy> async_proxy;  // null until a kernel calls tiled_shared_memory()
};

// A launched kernel.
struct Grid {
  dim3 size;
  unsigned threads = 0;
  size_t dynamic_bytes = 0;
  std::function<void()> kernel;
  Grid* previous = nullptr;    // the grid before, which may still run when this one starts
  std::vector<dim3> to_start;  // CTAs, in random order
  std::vector<std::unique_ptr<Cta>> resident;
  std::vector<unsigned> waiting;  // fibers of the next grid that wait for the end of this one

  bool done() const { return to_start.empty() && resident.empty(); }
};

// A cp.async copy that has been issued and has not landed.
struct AsyncCopy {
  void* shared;
  const void* global;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<uint8_t[]> stack;
  void* fake_stack = nullptr;  // belongs to the address sanitizer
  Cta* cta = nullptr;
  unsigned thread = 0;
  std::vector<std::vector<AsyncCopy>> groups;  // the last one is still open
  // The groups of wgmma. Each entry multiplies, together with its warp, when it is waited for.
  std::vector<std::vector<std::function<void()>>> multiplies;
  bool multiply_fenced = false;
};

struct Executor {
  std::mt19937 random;
  std::vector<std::unique_ptr<Fiber>> fibers;  // reused from CTA to CTA
  std::vector<unsigned> idle;                  // fibers that no CTA uses
  std::vector<std::unique_ptr<Grid>> grids;    // grids that were launched and not waited for
  std::vector<Warp*> ready;                    // warps with fibers that can run
  unsigned running = 0;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;

  Executor() {
    const char* seed = std::getenv("HOST_CUDA_SEED");
    random.seed(seed != nullptr ? static_cast<unsigned>(std::atoi(seed)) : 0u);
  }
  Fiber& current() { return *fibers[running]; }
};

inline Executor executor;

// Returns memory filled with 0xFF, which is NaN in every float type and not a small integer. The
// allocation has exactly the size asked for, so the address sanitizer notices a step beyond it.
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

// Records a lane's access to shared memory by a wrapper of ptx.cuh, at `where` in a kernel.
inline void access_shared(const void* pointer, unsigned bytes, const char* operation,
                          const std::source_location& where) {
  const Cta& cta = *executor.current().cta;
  const auto inside = [&](const auto& memory, size_t size) {
    const auto offset = reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(memory);
    return memory != nullptr && offset < size;
  };
  if (!inside(cta.static_memory.get(), cta.static_bytes) &&
      !inside(cta.dynamic_memory.get(), cta.grid->dynamic_bytes)) {
    std::fprintf(stderr, "host_cuda: %s in %s\n", operation, where.function_name());
    fail("an access to shared memory has an address outside it");
  }
  if (!report.wanted()) return;
  warp().accesses.add(report.site_of(where, operation, bytes), lane(), pointer);
}

// Called after an ordinary store of this thread.
inline void has_stored(const void* pointer, size_t bytes) {
  const Fiber& fiber = executor.current();
  if (fiber.cta->async_proxy != nullptr)
    fiber.cta->async_proxy->store(fiber.thread, pointer, bytes);
}

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

// Removes and returns the fiber that runs next.
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
  for (const unsigned number : barrier.waiting) {
    warp_of(number).accesses.count();  // its lanes have met
    make_ready(number);
  }
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
  executor.current().cta->grid->kernel();
  Fiber& fiber = executor.current();
  for (Barrier* barrier : {&warp().barrier, &fiber.cta->barrier}) {
    --barrier->live;  // nobody waits for a thread that has returned
    release_if_complete(*barrier);
  }
  to_scheduler(true);
}

inline void start_fiber(unsigned number, Cta* cta, unsigned thread) {
  Fiber& fiber = *executor.fibers[number];
  if (fiber.stack == nullptr) fiber.stack.reset(new uint8_t[kStackBytes]);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack.get(), kStackBytes);  // the last fiber never returned
#endif
  fiber.fake_stack = nullptr;
  fiber.cta = cta;
  fiber.thread = thread;
  fiber.groups.assign(1, {});
  fiber.multiplies.assign(1, {});
  fiber.multiply_fenced = false;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  make_ready(number);
}

inline std::unique_ptr<Cta> start_cta(Grid& grid) {
  auto cta = std::make_unique<Cta>();
  cta->grid = &grid;
  cta->index = grid.to_start.back();
  grid.to_start.pop_back();
  cta->barrier.live = grid.threads;
  cta->warps.resize((grid.threads + kLanes - 1) / kLanes);
  for (Warp& warp : cta->warps) warp.priority = executor.random();
  for (unsigned thread = 0; thread < grid.threads; ++thread) {
    ++cta->warps[thread / kLanes].barrier.live;
    if (executor.idle.empty()) {
      executor.idle.push_back(static_cast<unsigned>(executor.fibers.size()));
      executor.fibers.push_back(std::make_unique<Fiber>());
    }
    cta->fibers.push_back(executor.idle.back());
    executor.idle.pop_back();
    start_fiber(cta->fibers.back(), cta.get(), thread);
  }
  return cta;
}

// Ends each CTA whose threads have all returned, and starts another in its place.
inline void replace_ctas(Grid& grid) {
  for (auto& cta : grid.resident) {
    if (cta->barrier.live > 0) continue;
    if (!cta->bulk_copies.empty()) fail("a bulk copy is under way while its CTA ends");
    for (Warp& warp : cta->warps) warp.accesses.count();
    executor.idle.insert(executor.idle.end(), cta->fibers.begin(), cta->fibers.end());
    cta = nullptr;
  }
  std::erase(grid.resident, nullptr);
  while (grid.resident.size() < kResidentCtas && !grid.to_start.empty()) {
    grid.resident.push_back(start_cta(grid));
  }
  if (!grid.done()) return;
  for (const unsigned number : grid.waiting) make_ready(number);
  grid.waiting.clear();
}

inline void resume(unsigned number) {
  executor.running = number;
  const Fiber& fiber = *executor.fibers[number];
  threadIdx = {fiber.thread, 0, 0};
  blockIdx = fiber.cta->index;
  blockDim = {fiber.cta->grid->threads, 1, 1};
  gridDim = fiber.cta->grid->size;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackBytes);
#endif
  swapcontext(&executor.scheduler, &executor.fibers[number]->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// Runs every launched kernel to its end.
inline void synchronize() {
  for (;;) {
    for (auto& grid : executor.grids) replace_ctas(*grid);
    if (executor.ready.empty()) break;
    resume(take_ready());
  }
  for (const auto& grid : executor.grids) {
    if (!grid->done()) fail("deadlock: threads wait for others that do not come");
  }
  executor.grids.clear();
}

// Launches a kernel. A `dependent` kernel starts together with the kernel before it, which is the
// earliest that a GPU may start it.
inline void start(dim3 size, unsigned threads, size_t dynamic_bytes, bool dependent,
                  std::function<void()> kernel) {
  if (!dependent) synchronize();
  auto grid = std::make_unique<Grid>();
  grid->size = size;
  grid->threads = threads;
  grid->dynamic_bytes = dynamic_bytes;
  grid->kernel = std::move(kernel);
  if (!executor.grids.empty()) grid->previous = executor.grids.back().get();
  for (unsigned y = 0; y < size.y; ++y) {
    for (unsigned x = 0; x < size.x; ++x) grid->to_start.push_back({x, y, 0});
  }
  std::shuffle(grid->to_start.begin(), grid->to_start.end(), executor.random);
  executor.grids.push_back(std::move(grid));
}

inline void wait_for_previous_grid() {
  Grid* previous = executor.current().cta->grid->previous;
  if (previous == nullptr || previous->done()) return;
  previous->waiting.push_back(executor.running);
  to_scheduler(false);
}

}  // namespace host_cuda
