// The functions of csrc/cuda/hopper/ptx.cuh on the CPU, as the PTX ISA (9.0) describes the
// instructions. Swizzles, fragments and phases are written here anew and share no code with the
// kernels, so that an error of one side shows.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <type_traits>
#include <vector>

#include "ptx_host.h"

namespace pylora::cuda {

// What a TensorMap holds on the CPU.
struct HostTensorMap {
  const uint8_t* base;
  int64_t rows, cols, pitch;  // the pitch is the bytes from one row to the next
  int32_t item, box_rows, box_cols;
  Swizzle swizzle;
};
static_assert(sizeof(HostTensorMap) <= sizeof(TensorMap));

inline uint8_t* tiled_shared_memory() {
  host_cuda::Cta& cta = *host_cuda::executor.current().cta;
  auto& memory = cta.dynamic_memory;
  if (memory == nullptr) {
    memory.reset(host_cuda::poisoned(cta.grid->dynamic_bytes, 1024));
    cta.async_proxy =
        std::make_unique<host_cuda::AsyncProxy>(memory.get(), cta.grid->dynamic_bytes);
  }
  return memory.get();
}

// Returns the token of the tile to which register `i` of a product's accumulators belongs. Its row
// is fragment_row(i / 2). Only the tests need the number of the token.
inline constexpr int accumulator_token(int thread, int i) {
  return i / 4 * 8 + 2 * (thread % 4) + i % 2;
}

// Returns the async proxy's view of the CTA's shared memory.
inline host_cuda::AsyncProxy& async_proxy() {
  const host_cuda::Cta& cta = *host_cuda::executor.current().cta;
  if (cta.async_proxy == nullptr) host_cuda::fail("not the memory of tiled_shared_memory()");
  return *cta.async_proxy;
}

// fence.proxy.async. Each thread that has written shared memory with ordinary stores must call it
// before the barrier after which the copy engine or a product reaches those bytes. Today only the
// toy kernels that test the executor write such bytes.
inline void fence_async_proxy() { async_proxy().fence(host_cuda::executor.current().thread); }

template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

inline bool any_lane(bool value) {
  for (int mask = 1; mask < static_cast<int>(host_cuda::kLanes); mask *= 2) {
    value |= shuffle_xor(value, mask);
  }
  return value;
}

template <int kThreads>
void named_barrier(int id) {
  host_cuda::Cta& cta = *host_cuda::executor.current().cta;
  host_cuda::Barrier& barrier = cta.named_barriers[static_cast<unsigned>(id)];
  barrier.live = kThreads;
  host_cuda::wait_at(barrier, "bar.sync");
}

// mbarrier

struct HostBarrier {
  uint16_t expected, pending;  // arrivals of a phase, and arrivals that are missing
  int32_t bytes : 31;          // bytes that have not landed yet
  uint32_t phase : 1;          // the parity of the phase that is open
};
static_assert(sizeof(HostBarrier) == sizeof(Barrier));

inline HostBarrier& host_barrier(Barrier* barrier) {
  auto& state = *reinterpret_cast<HostBarrier*>(barrier);
  if (state.expected == 0xFFFF) host_cuda::fail("an mbarrier is used before its init");
  return state;
}

inline void complete_if_ready(Barrier* barrier) {
  HostBarrier& state = host_barrier(barrier);
  if (state.pending > 0 || state.bytes != 0) return;
  state.pending = state.expected;
  state.phase ^= 1;
  auto& waiting = host_cuda::executor.current().cta->waiting_at[barrier];
  for (const unsigned number : waiting) host_cuda::make_ready(number);
  waiting.clear();
}

inline void barrier_init(Barrier* barrier, int arrivals) {
  const auto count = static_cast<uint16_t>(arrivals);
  *reinterpret_cast<HostBarrier*>(barrier) = {count, count, 0, 0};
}
inline void barrier_init_fence() {}

// Lands the copies that are counted at this barrier.
inline void land_copies(Barrier* barrier) {
  auto& copies = host_cuda::executor.current().cta->bulk_copies;
  const auto others = std::stable_partition(
      copies.begin(), copies.end(), [&](const auto& copy) { return copy.barrier == barrier; });
  std::vector<host_cuda::BulkCopy> mine(copies.begin(), others);
  copies.erase(copies.begin(), others);
  for (const auto& copy : mine) copy.land();
}

inline void barrier_arrive_expect(Barrier* barrier, int bytes) {
  // If the phase before lacks only copies, they land now.
  if (host_barrier(barrier).pending == 0) land_copies(barrier);
  HostBarrier& state = host_barrier(barrier);
  if (state.pending == 0) host_cuda::fail("more threads arrive at an mbarrier than it expects");
  state.bytes += bytes;
  --state.pending;
  complete_if_ready(barrier);
}
inline void barrier_arrive(Barrier* barrier) { barrier_arrive_expect(barrier, 0); }

inline void barrier_wait(Barrier* barrier, int parity) {
  const auto open = [&] { return host_barrier(barrier).phase == static_cast<uint32_t>(parity); };
  if (!open()) return;
  land_copies(barrier);
  if (!open()) return;
  host_cuda::executor.current().cta->waiting_at[barrier].push_back(host_cuda::executor.running);
  host_cuda::to_scheduler(false);
}

// TMA

inline void prefetch_map(const TensorMap& /*map*/) {}

// Returns where the copy engine puts a byte whose address would be `address` without a swizzle.
inline uint8_t* swizzled(uint8_t* address, Swizzle swizzle) {
  const auto bits = reinterpret_cast<uintptr_t>(address);
  const uintptr_t rows = swizzle == Swizzle::k128 ? 7 : 1;
  return reinterpret_cast<uint8_t*>(bits ^ (bits >> 7 & rows) << 4);
}

// The copy lands at once or as late as it may, which is when a thread waits for its barrier. Until
// then the tile holds NaN, so a read that comes too early, or still expects the bytes from before,
// shows.
inline void copy_tile(void* shared, const TensorMap& tensor_map, int row, int column,
                      Barrier* barrier) {
  HostTensorMap map;
  std::memcpy(&map, &tensor_map, sizeof(map));
  const int row_bytes = map.box_cols * map.item;
  if (row_bytes != (map.swizzle == Swizzle::k128 ? 128 : 32)) {
    host_cuda::fail("the rows of a tile are not as long as its swizzle");
  }
  const uintptr_t alignment = map.swizzle == Swizzle::k128 ? 1024 : 256;
  if (reinterpret_cast<uintptr_t>(shared) % alignment != 0) {
    host_cuda::fail("a tile is not aligned to the pattern of its swizzle");
  }
  const auto tile = static_cast<uint8_t*>(shared);
  const int bytes = map.box_rows * row_bytes;
  const auto size = static_cast<size_t>(bytes);
  host_cuda::AsyncProxy& proxy = async_proxy();
  proxy.start_write("a copy", tile, size);
  std::memset(tile, 0xFF, size);
  proxy.written(tile, size);
  const auto land = [=, &proxy] {
    for (int i = 0; i < bytes; ++i) {
      const int64_t r = row + i / row_bytes;
      const int64_t c = column + i % row_bytes / map.item;
      const bool inside = r >= 0 && r < map.rows && c >= 0 && c < map.cols;
      const int64_t offset = r * map.pitch + c * map.item + i % map.item;
      *swizzled(tile + i, map.swizzle) = inside ? map.base[offset] : uint8_t{0};
    }
    proxy.written(tile, size);
    host_barrier(barrier).bytes -= bytes;
    complete_if_ready(barrier);
  };
  host_cuda::Cta& cta = *host_cuda::executor.current().cta;
  cta.bulk_copies.push_back({barrier, land});
  if (!cta.waiting_at[barrier].empty() || host_cuda::executor.random() % 2 == 0) {
    land_copies(barrier);
  }
}

inline void store_matrices_transposed(void* row, const uint32_t (&in)[4],
                                      const Where& where = Where::current()) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    host_cuda::fail("stmatrix of a row whose address is no multiple of 16");
  }
  host_cuda::access_shared(row, 16, "stmatrix", where);
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    host_cuda::Warp& warp = host_cuda::warp();
    const unsigned lane = host_cuda::lane();
    warp.lanes[lane].value = in[matrix];
    host_cuda::wait_at(warp.barrier, "stmatrix");
    uint16_t values[8];
    for (unsigned column = 0; column < 8; ++column) {  // gathers row lane % 8 of the matrix
      const uint64_t pair = warp.lanes[4 * column + lane % 8 / 2].value;
      values[column] = static_cast<uint16_t>(pair >> 16 * (lane % 2));
    }
    if (lane / 8 == matrix) {
      std::memcpy(row, values, sizeof(values));
      host_cuda::has_stored(row, sizeof(values));
    }
    host_cuda::wait_at(warp.barrier, "stmatrix");
  }
}

// WGMMA

template <class T>
T element_of(uint32_t pair, unsigned i) {
  return T{static_cast<uint16_t>(pair >> 16 * i)};
}
template <class T>
uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (unsigned i = 0; i < 2; ++i) {
    // The product is exact in fp64. So is the sum, unless the exponents are far apart.
    const double product =
        static_cast<double>(to_float(element_of<T>(a, i))) * to_float(element_of<T>(b, i));
    const double sum = product + to_float(element_of<T>(c, i));
    // Rounding to odd first makes the two roundings equal to one.
    auto nearest = static_cast<float>(sum);
    if (static_cast<double>(nearest) != sum && (std::bit_cast<uint32_t>(nearest) & 1) == 0) {
      nearest = std::nextafter(nearest, sum > nearest ? INFINITY : -INFINITY);
    }
    result |= static_cast<uint32_t>(from_float<T>(nearest).bits) << 16 * i;
  }
  return result;
}
template <class T>
uint32_t multiply_pair(uint32_t a, uint32_t b) {
  return fma_pair<T>(a, b, 0x80008000u);  // adding -0 keeps the sign of a product that is 0
}

// Returns a tile's address in the shared window. The CTA's memory may begin anywhere in it.
inline uint32_t shared_address(const void* pointer) {
  constexpr uint32_t kFirst = 1024;
  const auto* byte = static_cast<const uint8_t*>(pointer);
  return kFirst + static_cast<uint32_t>(byte - tiled_shared_memory());
}
inline const uint8_t* shared_pointer(uint32_t address) {
  return tiled_shared_memory() + (address - shared_address(tiled_shared_memory()));
}

inline SharedOperand shared_operand(const void* tile) {
  return SharedOperand::at(shared_address(tile));
}

// The fields of a matrix descriptor that a K-major operand with a swizzle of 128 bytes uses.
struct MatrixDescriptor {
  uint32_t start, stride;  // in bytes; the stride leads from one group of 8 rows to the next

  explicit MatrixDescriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3FFF) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3FFF) << 4) {
    if (start % 1024 >= 128) host_cuda::fail("B of a product is not aligned to 1024 bytes");
    if (bits >> 62 != 1) host_cuda::fail("a descriptor's layout is not the swizzle of 128 bytes");
    if ((bits >> 49 & 7) != 0) host_cuda::fail("a descriptor has a base offset");
  }
};

inline void multiply_fence() { host_cuda::executor.current().multiply_fenced = true; }
inline void multiply_commit() {
  host_cuda::Fiber& fiber = host_cuda::executor.current();
  fiber.multiplies.emplace_back();
  fiber.multiply_fenced = false;
}
template <int kPending>
void multiply_wait() {
  host_cuda::Fiber& fiber = host_cuda::executor.current();
  while (fiber.multiplies.size() > kPending + 1) {
    const auto group = std::move(fiber.multiplies.front());
    fiber.multiplies.erase(fiber.multiplies.begin());
    for (const auto& product : group) product();
  }
}

template <class Registers>
void settle(Registers& /*registers*/) {}

// Unpacks the elements of one 32-bit register of A or B.
template <class T>
void unpack(uint32_t word, float (&out)[4 / sizeof(T)]) {
  if constexpr (sizeof(T) == 4) {
    out[0] = std::bit_cast<float>(word & 0xFFFFE000u);  // TF32 keeps these bits
  } else {
    for (unsigned i = 0; i < 2; ++i) out[i] = to_float(element_of<T>(word, i));
  }
}

// Issues a product. It reads the registers of a, and B, when a thread waits for it, which is the
// latest that a GPU may read them. Each warp computes its own 16 rows.
template <class T, int kTokens>
void multiply(float (&d)[kTokens / 2], const uint32_t (&a)[4], SharedOperand b, int add) {
  if (!host_cuda::executor.current().multiply_fenced) host_cuda::fail("wgmma without a fence");
  const MatrixDescriptor descriptor(b.descriptor);
  const uint8_t* const start = shared_pointer(descriptor.start);
  const size_t stride = descriptor.stride;
  // The swizzled place of the 16 bytes with word `word` of a token's 8 words in this step.
  const auto unit_of = [=](unsigned token, unsigned word) {
    const uint8_t* line = start + token / 8 * stride + token % 8 * 128;
    return swizzled(const_cast<uint8_t*>(line) + word / 4 * 16, Swizzle::k128);
  };
  if (host_cuda::lane() == 0) {  // checked now, because a GPU may read B at once
    for (unsigned token = 0; token < kTokens; ++token) {
      for (unsigned word = 0; word < 8; word += 4) {
        async_proxy().read("wgmma", unit_of(token, word), 16);
      }
    }
  }
  float* const out = d;
  const uint32_t* const in = a;
  host_cuda::executor.current().multiplies.back().push_back([=] {
    constexpr unsigned kOfWord = 4 / sizeof(T);
    constexpr unsigned kDepth = 8 * kOfWord;
    host_cuda::Warp& warp = host_cuda::warp();
    const unsigned lane = host_cuda::lane();
    for (unsigned i = 0; i < 4; ++i) {
      float values[kOfWord];
      unpack<T>(in[i], values);
      std::copy(values, values + kOfWord, warp.lanes[lane].a + kOfWord * i);
    }
    host_cuda::wait_at(warp.barrier, "wgmma");
    float rows[2][kDepth];
    for (unsigned k = 0; k < kDepth; ++k) {
      const unsigned holder = lane / 4 * 4 + k / kOfWord % 4;
      const unsigned word = k / (4 * kOfWord) * 2;  // the register of row g; the next has row g + 8
      for (unsigned r = 0; r < 2; ++r) {
        rows[r][k] = warp.lanes[holder].a[kOfWord * (word + r) + k % kOfWord];
      }
    }
    for (unsigned token = 2 * (lane % 4); token < kTokens; token += token % 2 == 0 ? 1 : 7) {
      double sums[2] = {};
      for (unsigned word = 0; word < 8; ++word) {
        uint32_t bits;
        std::memcpy(&bits, unit_of(token, word) + word % 4 * 4, 4);
        float values[kOfWord];
        unpack<T>(bits, values);
        for (unsigned i = 0; i < kOfWord; ++i) {
          for (unsigned r = 0; r < 2; ++r) {
            sums[r] += static_cast<double>(rows[r][word * kOfWord + i]) * values[i];
          }
        }
      }
      for (unsigned r = 0; r < 2; ++r) {
        float& sum = out[token / 8 * 4 + 2 * r + token % 2];
        sum = (add != 0 ? sum : 0.0f) + static_cast<float>(sums[r]);
      }
    }
    host_cuda::wait_at(warp.barrier, "wgmma");
  });
}

}  // namespace pylora::cuda
