// Prints as JSON which thread holds which element, both by the functions of csrc/cuda and by the
// executor's twins of the instructions. tests/test_cutlass_layouts.py compares both with CUTLASS's
// definitions.
#include <cstdio>
#include <functional>
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

// Prints an array of `sizes[0]` arrays of `sizes[1]` arrays and so on. `print` prints one element.
using Index = std::vector<int>;
void print_array(const Index& sizes, const std::function<void(const Index&)>& print,
                 Index index = {}) {
  if (index.size() == sizes.size()) return print(index);
  std::printf("[");
  index.push_back(0);
  for (; index.back() < sizes[index.size() - 1]; ++index.back()) {
    if (index.back() > 0) std::printf(",");
    print_array(sizes, print, index);
  }
  std::printf("]");
}
void print_integers(const char* name, const Index& sizes,
                    const std::function<long(const Index&)>& of) {
  std::printf("\"%s\": ", name);
  print_array(sizes, [&](const Index& index) { std::printf("%ld", of(index)); });
  std::printf(",\n");
}

// Prints the maps of hopper/lora_linear.cu. As in CUTLASS, an index is row + 64 * column.
void print_maps() {
  print_integers("weights", {kSteps, kGroupThreads, 8}, [](const Index& at) {
    const int step = at[0], thread = at[1], i = at[2] / 2;
    // Byte j of word w holds columns 8 w + 2 j and 8 w + 2 j + 1.
    const int column = 8 * fragment_word(step, i) + 2 * fragment_byte(thread) + at[2] % 2;
    return fragment_row(thread, i) + kGroupRows * (column - 16 * step);
  });
  print_integers("lora_B", {kSteps, kGroupThreads, 4}, [](const Index& at) {
    const int step = at[0], thread = at[1], i = at[2];
    return fragment_row(thread, i) + kGroupRows * (fragment_rank(thread, step, i) - 8 * step);
  });
  print_integers("sums", {kGroupThreads, 128}, [](const Index& at) {
    return fragment_row(at[0], at[1] / 2) + kGroupRows * accumulator_token(at[0], at[1]);
  });
  print_integers("packed tile", {kTileRows, 2},
                 [](const Index& at) { return packed_offset(at[0], at[1]); });
  // What stmatrix stores. "staged sums" has the sum that each element of a lane's registers is. A
  // lane's address is that of a "staged token", and of the 8 rows of W that begin at 8 * unit.
  constexpr int kPairs = kStagedTokens / 16;
  print_integers("staged sums", {kPairs, 8}, [](const Index& at) {
    const int i = at[1] / 2;
    return 4 * staged_octet(at[0], i) + i % 2 * 2 + at[1] % 2;
  });
  print_integers("staged tokens", {kPairs, kLanes},
                 [](const Index& at) { return staged_token(at[0], at[1]); });
  print_integers("staged units", {4, kLanes},
                 [](const Index& at) { return staged_unit(at[0], at[1]); });
}

void print_descriptors() {
  std::printf("\"descriptors\": {");
  for (const uint32_t start : {0u, 1024u, 65536u, 131072u, 231424u}) {
    std::printf("%s\"%u\": [", start == 0 ? "" : ", ", start);
    for (int step = 0; step < kSteps; ++step) {
      const SharedOperand operand = SharedOperand::at(start).behind(step * kStepBytes);
      std::printf("%s\"%016llx\"", step == 0 ? "" : ", ",
                  static_cast<unsigned long long>(operand.descriptor));
    }
    std::printf("]");
  }
  std::printf("},\n");
}

template <class Kernel, class... Arguments>
void run(Kernel* kernel, int threads, size_t shared_bytes, Arguments... arguments) {
  LaunchShape shape;
  shape.threads = threads;
  shape.shared_bytes = shared_bytes;
  launch(kernel, shape, arguments...);
  cudaDeviceSynchronize();
}

// Loads matrices of 16-bit elements that are numbered in the order of memory, and stores matrices
// that are numbered in the order of the lanes' registers.
void move_matrices(uint16_t* loaded, uint16_t* transposed, uint16_t* stored) {
  auto* memory = reinterpret_cast<uint16_t*>(dynamic_shared_memory());
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) memory[8 * lane + i] = static_cast<uint16_t>(8 * lane + i);
  __syncwarp();
  uint32_t registers[4];
  load_matrices(registers, memory + 8 * lane);
  std::memcpy(loaded + 8 * lane, registers, 16);
  load_matrices_transposed(registers, memory + 8 * lane);
  std::memcpy(transposed + 8 * lane, registers, 16);
  for (uint32_t i = 0; i < 4; ++i) {
    const auto first = 8 * static_cast<uint32_t>(lane) + 2 * i;
    registers[i] = (first + 1) << 16 | first;
  }
  store_matrices_transposed(memory + 8 * lane, registers);
  __syncwarp();
  std::memcpy(stored + 8 * lane, memory + 8 * lane, 16);
}

void print_moves() {
  std::vector<uint16_t> loaded(256), transposed(256), stored(256), place(256);
  run(move_matrices, kLanes, 512, loaded.data(), transposed.data(), stored.data());
  for (size_t i = 0; i < 256; ++i) place[stored[i]] = static_cast<uint16_t>(i);
  const auto print = [](const char* name, const std::vector<uint16_t>& values) {
    print_integers(name, {kLanes, 8},
                   [&](const Index& at) { return values[static_cast<size_t>(8 * at[0] + at[1])]; });
  };
  print("ldmatrix", loaded);
  print("ldmatrix transposed", transposed);
  print("stmatrix transposed", place);
}

// Returns small integers without a pattern that a wrong map could preserve.
int value_of(size_t i) { return static_cast<int>((i * 2654435761u >> 13) % 13) - 6; }

template <class T>
uint32_t pair_of(int first, int second) {
  return pack_pair<T>(static_cast<float>(first), static_cast<float>(second));
}

template <class T>
void multiply_warp(const int* a, const int* b, float* d) {
  const unsigned lane = threadIdx.x;
  uint32_t left[4], right[2];
  for (unsigned i = 0; i < 4; ++i)
    left[i] = pair_of<T>(a[8 * lane + 2 * i], a[8 * lane + 2 * i + 1]);
  for (unsigned i = 0; i < 2; ++i)
    right[i] = pair_of<T>(b[4 * lane + 2 * i], b[4 * lane + 2 * i + 1]);
  float sums[4] = {};
  mma_16x8x16<T>(sums, left, right[0], right[1]);
  std::memcpy(d + 4 * lane, sums, sizeof(sums));
}

void print_product(const char* name, const std::vector<int>& a, const std::vector<int>& b,
                   const std::vector<float>& d) {
  std::printf("\"%s\": {", name);
  const auto print = [](const char* matrix, const auto& values, const char* end) {
    std::printf("\"%s\": ", matrix);
    print_array({static_cast<int>(values.size())}, [&](const Index& at) {
      std::printf("%ld", static_cast<long>(values[static_cast<size_t>(at[0])]));
    });
    std::printf("%s", end);
  };
  print("A", a, ", ");
  print("B", b, ", ");
  print("D", d, "},\n");
}

std::vector<int> values(size_t count, size_t first) {
  std::vector<int> result(count);
  for (size_t i = 0; i < count; ++i) result[i] = value_of(first + i);
  return result;
}

template <class T>
void print_mma(const char* name) {
  const std::vector<int> a = values(8 * kLanes, 0), b = values(4 * kLanes, 1000);
  std::vector<float> d(4 * kLanes);
  run(multiply_warp<T>, kLanes, 0, a.data(), b.data(), d.data());
  print_product(name, a, b, d);
}

// Computes d = A B over the four steps along k. `b` has the words of B's tile in memory order.
template <class T, int kTokens>
void multiply_group(const uint32_t* a, const uint32_t* b, float* d) {
  uint8_t* tile = tiled_shared_memory();
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kTokens * kTokenBytes / 4; i += kGroupThreads) {
    store_shared(reinterpret_cast<uint32_t*>(tile) + i, b[i]);
  }
  fence_async_proxy();
  __syncthreads();
  uint32_t fragments[kSteps][4];
  std::memcpy(fragments, a + thread * kSteps * 4, sizeof(fragments));
  float sums[kTokens / 2];
  multiply_fence();
  for (int step = 0; step < kSteps; ++step) {
    multiply<T, kTokens>(sums, fragments[step], shared_operand(tile).behind(step * kStepBytes),
                         step > 0);
  }
  multiply_commit();
  multiply_wait<0>();
  std::memcpy(d + thread * kTokens / 2, sums, sizeof(sums));
}

template <class T, int kTokens>
void print_wgmma(const char* name) {
  constexpr size_t kOfWord = 4 / sizeof(T);
  const auto words = [](const std::vector<int>& of) {
    std::vector<uint32_t> result;
    for (size_t i = 0; i < of.size(); i += kOfWord) {
      const auto first = static_cast<float>(of[i]);
      result.push_back(kOfWord == 1 ? __float_as_uint(first)
                                    : pair_of<T>(of[i], of[i + kOfWord / 2]));
    }
    return result;
  };
  const std::vector<int> a = values(kGroupThreads * kSteps * 4 * kOfWord, 0);
  const std::vector<int> b = values(kTokens * kTokenBytes / sizeof(T), 100000);
  const std::vector<uint32_t> a_words = words(a), b_words = words(b);
  std::vector<float> d(kGroupThreads * kTokens / 2);
  run(multiply_group<T, kTokens>, kGroupThreads, kTokens * kTokenBytes, a_words.data(),
      b_words.data(), d.data());
  print_product(name, a, b, d);
}

// Writes out a tile as a copy leaves it in shared memory.
void copy_units(TensorMap map, int bytes, uint8_t* out) {
  uint8_t* tile = tiled_shared_memory();
  auto* barrier = reinterpret_cast<Barrier*>(tile + bytes);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
    barrier_arrive_expect(barrier, bytes);
    copy_tile(tile, map, 0, 0, barrier);
  }
  __syncthreads();
  barrier_wait(barrier, 0);
  if (threadIdx.x == 0) std::memcpy(out, tile, static_cast<size_t>(bytes));
}

// Prints the offset at which a copy puts each 16-byte unit of each row.
void print_copy(const char* name, Swizzle swizzle, int rows) {
  const int units = swizzle == Swizzle::k128 ? 8 : 2;
  const size_t bytes = static_cast<size_t>(rows * units * kVectorBytes);
  std::vector<uint16_t> in(bytes / 2), out(bytes / 2);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint16_t>(i / 8);
  TiledMatrix matrix;
  matrix.data = in.data();
  matrix.item_bytes = swizzle == Swizzle::k128 ? 2 : 1;
  matrix.rows = matrix.tile_rows = rows;
  matrix.pitch = units * kVectorBytes;
  matrix.cols = matrix.pitch / matrix.item_bytes;
  matrix.swizzle = swizzle;
  TensorMap map;
  if (encode_tensor_map(matrix, &map) != cudaSuccess) host_cuda::fail("no tensor map");
  run(copy_units, kLanes, bytes + sizeof(Barrier), map, static_cast<int>(bytes),
      reinterpret_cast<uint8_t*>(out.data()));
  std::vector<long> offsets(in.size() / 8);
  for (size_t i = 0; i < out.size(); i += 8) offsets[out[i]] = static_cast<long>(2 * i);
  print_integers(name, {rows, units}, [&](const Index& at) {
    return offsets[static_cast<size_t>(at[0] * units + at[1])];
  });
}

}  // namespace

int main() {
  std::printf("{");
  print_maps();
  print_descriptors();
  print_moves();
  print_mma<__half>("mma fp16");
  print_mma<__nv_bfloat16>("mma bf16");
  print_wgmma<__half, 128>("wgmma fp16");
  print_wgmma<__nv_bfloat16, 256>("wgmma bf16");
  print_wgmma<float, 128>("wgmma tf32");
  print_copy("copy, 128 bytes", Swizzle::k128, 64);
  print_copy("copy, 32 bytes", Swizzle::k32, 128);
  std::printf("\"steps\": %d}\n", kSteps);
}
