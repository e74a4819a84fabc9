// A toy kernel with all the parts of hopper/lora_linear.cu. The command line names a bug, and the
// kernel runs with that bug in it, or without a bug for "none". The exit code is 0 if the result is
// right. The executor must notice every bug.
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/common/launch.cuh"
#include "cuda/hopper/maps.cuh"
#include "cuda/hopper/ptx.cuh"
#include "cuda/hopper/tensor_map.cuh"

namespace {

using namespace pylora;
using namespace pylora::cuda;

enum class Bug {
  kNone,
  kNoWaitForCopy,
  kNoWaitForStage,
  kStageLeftEarly,
  kSumsReadEarly,
  kFragmentsOverwritten,
  kNoFence,
  kTooFewBytes,
  kNoInit,
  kTooFewArrivals,
  kOtherSwizzle,
  kOtherColumns,
  kOtherRows,
  kNotTransposed,
  kNoNamedBarrier,
};
constexpr const char* kNames[] = {
    "none",
    "missing wait for a copy",
    "missing wait before a stage is filled again",
    "stage left before its products are done",
    "sums read before they are waited for",
    "fragments overwritten under way",
    "missing fence before a product",
    "barrier expects too few bytes",
    "barrier without init",
    "warps arrive that no barrier expects",
    "wrong swizzle",
    "wrong columns of B",
    "wrong rows of A",
    "stored without transposing",
    "missing named barrier",
};

constexpr int kTokens = 128, kKTiles = 5, kColumns = 64 * kKTiles, kStages = 2;
constexpr int kTileBytes = kTokens * kTokenBytes;
constexpr int kSharedBytes = kStages * kTileBytes + 2 * kStages * 8;

// Computes y [kTokens, 64] = b a^T with small integers in fp16: a [64, kColumns], b [kTokens,
// kColumns]. The first warpgroup copies; the second multiplies and stores through shared memory.
template <Bug kBug>
void multiply_through_ring(TensorMap b_map, const uint16_t* a, uint16_t* y) {
  uint8_t* stages = tiled_shared_memory();
  auto* full = reinterpret_cast<Barrier*>(stages + kStages * kTileBytes);
  Barrier* empty = full + kStages;
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  const int warp = thread / kLanes, lane = thread % kLanes;
  if (threadIdx.x == 0 && kBug != Bug::kNoInit) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, kBug == Bug::kTooFewArrivals ? 1 : 4);
    }
    barrier_init_fence();
  }
  __syncthreads();
  RingPlace place;
  if (threadIdx.x < kGroupThreads) {
    if (threadIdx.x > 0) return;
    for (int k_tile = 0; k_tile < kKTiles; ++k_tile) {
      Barrier* barrier = full + place.stage;
      if (kBug != Bug::kNoWaitForStage) barrier_wait(empty + place.stage, place.parity ^ 1);
      barrier_arrive_expect(barrier, kTileBytes / (kBug == Bug::kTooFewBytes ? 2 : 1));
      copy_tile(stages + place.stage * kTileBytes, b_map, 0, 64 * k_tile, barrier);
      place.advance(kStages);
    }
    return;
  }
  float sums[kTokens / 2];
  uint32_t fragments[2][kSteps][4];
  int used = 0;
  for (int k_tile = 0; k_tile < kKTiles; ++k_tile) {
    auto& mine = fragments[kBug == Bug::kFragmentsOverwritten ? 0 : k_tile % 2];
    for (int step = 0; step < kSteps; ++step) {
      for (int i = 0; i < 4; ++i) {
        const int row = fragment_row(thread, kBug == Bug::kOtherRows ? 1 - i % 2 : i);
        const int column = 64 * k_tile + 8 * fragment_word(step, i) + 2 * fragment_byte(thread);
        std::memcpy(&mine[step][i], a + row * kColumns + column, 4);
      }
    }
    if (kBug != Bug::kNoWaitForCopy) barrier_wait(full + place.stage, place.parity);
    const SharedOperand b = shared_operand(stages + place.stage * kTileBytes);
    if (kBug != Bug::kNoFence) multiply_fence();
    for (int step = 0; step < kSteps; ++step) {
      const int other = kBug == Bug::kOtherColumns ? step ^ 1 : step;
      multiply<__half, kTokens>(sums, mine[step], b.behind(other * kStepBytes), k_tile + step > 0);
    }
    multiply_commit();
    multiply_wait<1>();
    const bool early = kBug == Bug::kStageLeftEarly;
    if (lane == 0 && (early || k_tile > 0)) barrier_arrive(empty + (early ? place.stage : used));
    used = place.stage;
    place.advance(kStages);
  }
  if (kBug != Bug::kSumsReadEarly) multiply_wait<0>();
  named_barrier<kGroupThreads>(1);  // all threads have left both stages, which now hold y
  const auto staged = [&](int token, int unit) { return stages + token * 128 + unit * 16; };
  for (int pair = 0; pair < kTokens / 16; ++pair) {
    uint32_t out[4];
    for (int i = 0; i < 4; ++i) {
      const int sum = 4 * staged_octet(pair, i) + i % 2 * 2;
      out[i] = __half{from_float<Half>(sums[sum])}.bits |
               static_cast<uint32_t>(from_float<Half>(sums[sum + 1]).bits) << 16;
    }
    uint8_t* row = staged(staged_token(pair, lane), staged_unit(warp, lane));
    if (kBug != Bug::kNotTransposed) {
      store_matrices_transposed(row, out);
    } else {
      for (unsigned i = 0; i < 4; ++i) {  // the four lanes that hold a row store it as it is
        const int from = 8 * static_cast<int>(i) + lane / 4;
        std::memcpy(staged(staged_token(pair, from), staged_unit(warp, from)) + lane % 4 * 4,
                    &out[i], 4);
      }
    }
  }
  if (kBug != Bug::kNoNamedBarrier) named_barrier<kGroupThreads>(1);
  std::memcpy(y + thread * kGroupRows, staged(thread, 0), 2 * kGroupRows);
}

template <int kBug>
bool result_is_right(const std::string& name) {
  if constexpr (kBug == std::size(kNames)) {
    std::fprintf(stderr, "no such bug: %s\n", name.c_str());
    std::exit(2);
  } else {
    if (name != kNames[kBug]) return result_is_right<kBug + 1>(name);
    std::vector<int> a(kGroupRows * kColumns), b(kTokens * kColumns);
    std::vector<uint16_t> a_bits, b_bits, y(kTokens * kGroupRows, 0xFFFF);
    for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<int>(i * i % 7) - 3;
    for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<int>(i * i % 11 + i / 320 % 3) - 5;
    const auto bits = [](int x) { return from_float<Half>(static_cast<float>(x)).bits; };
    for (const int x : a) a_bits.push_back(bits(x));
    for (const int x : b) b_bits.push_back(bits(x));
    TiledMatrix matrix;
    matrix.data = b_bits.data();
    matrix.item_bytes = 2;
    matrix.rows = kTokens;
    matrix.cols = kColumns;
    matrix.pitch = 2 * kColumns;
    matrix.tile_rows = kTokens;
    TensorMap map;
    if (encode_tensor_map(matrix, &map) != cudaSuccess) return false;
    if (static_cast<Bug>(kBug) == Bug::kOtherSwizzle) {
      // Four tiles with rows of 32 bytes take the tile's place, so other units are swapped.
      HostTensorMap wrong;
      std::memcpy(&wrong, &map, sizeof(wrong));
      wrong.box_cols /= 4;
      wrong.box_rows *= 4;
      wrong.swizzle = Swizzle::k32;
      std::memcpy(&map, &wrong, sizeof(wrong));
    }
    LaunchShape shape;
    shape.threads = 2 * kGroupThreads;
    shape.shared_bytes = kSharedBytes;
    launch(multiply_through_ring<static_cast<Bug>(kBug)>, shape, map,
           static_cast<const uint16_t*>(a_bits.data()), y.data());
    cudaDeviceSynchronize();
    for (size_t token = 0; token < kTokens; ++token) {
      for (size_t row = 0; row < kGroupRows; ++row) {
        int sum = 0;
        for (size_t k = 0; k < kColumns; ++k)
          sum += a[row * kColumns + k] * b[token * kColumns + k];
        if (y[token * kGroupRows + row] != bits(sum)) return false;
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
