// A toy kernel whose threads write B of a product with ordinary stores. wgmma and TMA reach shared
// memory through the async proxy, which does not see such stores without a fence. The command line
// names a bug, and the kernel runs with that bug in it, or without a bug for "none". The exit code
// is 0 if the result is right.
#include <cstdio>
#include <string>
#include <vector>

#include "common/float16.h"
#include "cuda/common/element.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/hopper/maps.cuh"
#include "cuda/hopper/ptx.cuh"
#include "cuda/hopper/tensor_map.cuh"

namespace {

using namespace pylora;
using namespace pylora::cuda;

enum class Bug {
  kNone,
  kNoFence,
  kFenceOfOneThread,
  kFenceOfAllButOne,
  kFenceBeforeStores,
  kFenceBehindBarrier,
  kStoreBehindFence,
  kPlainStores,
  kNoFenceOfMatrices,
  kNoFenceOfCopies,
  kCopiedOver,
};
constexpr const char* kNames[] = {
    "none",
    "no fence",
    "fence of one thread",
    "fence of all threads but one",
    "fence before the stores",
    "fence behind the barrier",
    "a store behind the fence",
    "plain stores",
    "no fence after stmatrix",
    "no fence after cp.async",
    "no fence before a copy to the same place",
};

constexpr int kTokens = 128, kColumns = 64;
constexpr int kTileBytes = kTokens * kTokenBytes;

// Computes y [kTokens, 64] = b a^T in fp16 with a [64, 16] and the first 16 columns of b [kTokens,
// 64]. Each thread stores one token of b at its place.
template <Bug kBug>
void multiply_stored(TensorMap b_map, const uint16_t* a, const uint16_t* b, float* y) {
  uint8_t* tile = tiled_shared_memory();
  auto* barrier = reinterpret_cast<Barrier*>(tile + kTileBytes);
  const int thread = static_cast<int>(threadIdx.x);
  const auto place = [&](int token, int unit) {  // where the swizzle of 128 bytes puts it
    return reinterpret_cast<uint4*>(tile + token * kTokenBytes + (unit ^ token % 8) * kVectorBytes);
  };
  const auto source = [&](int unit) {
    return reinterpret_cast<const uint4*>(b + thread * kColumns) + unit;
  };
  if (thread == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
  }
  if (kBug == Bug::kFenceBeforeStores) fence_async_proxy();
  for (int unit = 0; unit < 8; ++unit) {
    if (kBug == Bug::kPlainStores) {
      *place(thread, unit) = *source(unit);
    } else if (kBug == Bug::kNoFenceOfCopies) {
      copy_async_16(place(thread, unit), source(unit));
    } else {
      store_shared(place(thread, unit), *source(unit));
    }
  }
  copy_async_commit();
  copy_async_wait<0>();
  constexpr bool kFences = kBug == Bug::kNone || kBug == Bug::kStoreBehindFence ||
                           kBug == Bug::kPlainStores || kBug == Bug::kNoFenceOfMatrices;
  if (kFences || (kBug == Bug::kFenceOfOneThread && thread == 0) ||
      (kBug == Bug::kFenceOfAllButOne && thread != 77)) {
    fence_async_proxy();
  }
  if (kBug == Bug::kStoreBehindFence && thread == 5) store_shared(place(5, 0), *source(0));
  if (kBug == Bug::kNoFenceOfMatrices) {
    uint32_t words[4];
    load_matrices(words, place(thread, 0));
    __syncwarp();
    store_matrices_transposed(place(thread, 0), words);
  }
  __syncthreads();
  if (kBug == Bug::kFenceBehindBarrier) fence_async_proxy();
  if (kBug == Bug::kCopiedOver) {  // the copy engine writes the same values again
    if (thread == 0) {
      barrier_arrive_expect(barrier, kTileBytes);
      copy_tile(tile, b_map, 0, 0, barrier);
    }
    barrier_wait(barrier, 0);
  }
  uint32_t fragment[4];
  for (int i = 0; i < 4; ++i) {
    const int column = 8 * fragment_word(0, i) + 2 * fragment_byte(thread);
    std::memcpy(&fragment[i], a + fragment_row(thread, i) * 16 + column, 4);
  }
  float sums[kTokens / 2];
  multiply_fence();
  multiply<__half, kTokens>(sums, fragment, shared_operand(tile), 0);
  multiply_commit();
  multiply_wait<0>();
  for (int i = 0; i < kTokens / 2; ++i) {
    y[accumulator_token(thread, i) * kGroupRows + fragment_row(thread, i / 2)] = sums[i];
  }
}

template <int kBug>
bool result_is_right(const std::string& name) {
  if constexpr (kBug == std::size(kNames)) {
    std::fprintf(stderr, "no such bug: %s\n", name.c_str());
    std::exit(2);
  } else {
    if (name != kNames[kBug]) return result_is_right<kBug + 1>(name);
    const auto value = [](size_t i) { return static_cast<int>(i * i % 11) - 5; };
    const auto bits = [&](size_t i) { return from_float<Half>(static_cast<float>(value(i))).bits; };
    std::vector<uint16_t> a(kGroupRows * 16);
    alignas(16) static uint16_t b[kTokens * kColumns];
    for (size_t i = 0; i < a.size(); ++i) a[i] = bits(i);
    for (size_t i = 0; i < std::size(b); ++i) b[i] = bits(i + 7);
    std::vector<float> y(kTokens * kGroupRows);
    TiledMatrix matrix;
    matrix.data = b;
    matrix.item_bytes = 2;
    matrix.rows = matrix.tile_rows = kTokens;
    matrix.cols = kColumns;
    matrix.pitch = 2 * kColumns;
    TensorMap map;
    if (encode_tensor_map(matrix, &map) != cudaSuccess) return false;
    LaunchShape shape;
    shape.threads = kGroupThreads;
    shape.shared_bytes = kTileBytes + sizeof(Barrier);
    launch(multiply_stored<static_cast<Bug>(kBug)>, shape, map,
           static_cast<const uint16_t*>(a.data()), static_cast<const uint16_t*>(b), y.data());
    cudaDeviceSynchronize();
    for (size_t token = 0; token < kTokens; ++token) {
      for (size_t row = 0; row < kGroupRows; ++row) {
        int sum = 0;
        for (size_t k = 0; k < 16; ++k)
          sum += value(row * 16 + k) * value(token * kColumns + k + 7);
        if (y[token * kGroupRows + row] != static_cast<float>(sum)) return false;
      }
    }
    return true;
  }
}

}  // namespace

int main(int, char** arguments) {
  if (result_is_right<0>(arguments[1])) return 0;
  std::fprintf(stderr, "the result is wrong\n");
  return 1;
}
