// One warp accesses shared memory in a pattern whose bank conflicts are known. The command line
// names the pattern. The access is made kTimes times, and the report has the counts.
#include <cstdio>
#include <string>

#include "cuda/common/launch.cuh"
#include "cuda/hopper/ptx.cuh"

namespace {

using namespace pylora;
using namespace pylora::cuda;

constexpr int kTimes = 3;
constexpr int kSharedBytes = 32 << 10;

// Each of the first kActive lanes loads a T, kStride bytes after that of the lane before.
template <class T, int kStride, int kActive>
void load_strided(int* out) {
  const uint8_t* memory = tiled_shared_memory();
  const int lane = static_cast<int>(threadIdx.x);
  int sum = 0;
  for (int i = 0; i < kTimes && lane < kActive; ++i) {
    const T value = load_shared(reinterpret_cast<const T*>(memory + kStride * lane));
    sum += static_cast<int>(*reinterpret_cast<const uint8_t*>(&value));
  }
  __syncwarp();
  out[lane] = sum;
}

template <int kStride>
void load_rows(int* out) {
  const uint8_t* memory = tiled_shared_memory();
  uint32_t words[4] = {};
  for (int i = 0; i < kTimes; ++i) load_matrices(words, memory + kStride * threadIdx.x);
  out[threadIdx.x] = static_cast<int>(words[0]);
}

template <int kStride>
void store_rows(int* out) {
  uint8_t* memory = tiled_shared_memory();
  const uint32_t words[4] = {};
  for (int i = 0; i < kTimes; ++i) store_matrices_transposed(memory + kStride * threadIdx.x, words);
  out[threadIdx.x] = 0;
}

// Each lane loads 16 bytes of a row of 128 bytes, from where the swizzle of 128 bytes puts them.
void load_swizzled_rows(int* out) {
  const uint8_t* memory = tiled_shared_memory();
  uint32_t words[4] = {};
  const int row = static_cast<int>(threadIdx.x) % 8, unit = static_cast<int>(threadIdx.x) / 8;
  for (int i = 0; i < kTimes; ++i) load_matrices(words, memory + 128 * row + 16 * (unit ^ row));
  out[threadIdx.x] = static_cast<int>(words[0]);
}

template <int kStride>
void copy_strided(int* out) {
  uint8_t* memory = tiled_shared_memory();
  for (int i = 0; i < kTimes; ++i) copy_async_16(memory + kStride * threadIdx.x, out);
  copy_async_commit();
  copy_async_wait<0>();
}

// All lanes store to the same bank, but each to another address.
void store_column(int* out) {
  uint8_t* memory = tiled_shared_memory();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < kTimes; ++i) {
    store_shared(reinterpret_cast<int*>(memory + 128 * lane), lane);
  }
  __syncwarp();
  out[lane] = 0;
}

// The odd lanes skip the first access. If the lanes do not meet, each later access of an odd lane
// is counted with the access before it of the even lanes, so the conflicts are not the real ones.
template <bool kMeet>
void load_diverged(int* out) {
  const auto* memory = reinterpret_cast<const int*>(tiled_shared_memory());
  const int lane = static_cast<int>(threadIdx.x);
  int sum = 0;
  for (int i = 0; i < kTimes; ++i) {
    if (i > 0 || lane % 2 == 0) sum += load_shared(memory + 32 * i + (lane + i) % 32) & 1;
    if (kMeet) __syncwarp();
  }
  out[lane] = sum;
}

using Kernel = void (*)(int*);
constexpr struct {
  const char* name;
  Kernel kernel;
} kPatterns[] = {
    {"words beside each other", load_strided<uint32_t, 4, 32>},
    {"every other word", load_strided<uint32_t, 8, 32>},
    {"every 32nd word", load_strided<uint32_t, 128, 32>},
    {"every 33rd word", load_strided<uint32_t, 132, 32>},
    {"the same word", load_strided<uint32_t, 0, 32>},
    {"a word of one lane", load_strided<uint32_t, 4, 1>},
    {"bytes beside each other", load_strided<uint8_t, 1, 32>},
    {"8 bytes beside each other", load_strided<uint64_t, 8, 32>},
    {"16 bytes beside each other", load_strided<uint4, 16, 32>},
    {"16 bytes of every 32", load_strided<uint4, 32, 32>},
    {"the same 16 bytes", load_strided<uint4, 0, 32>},
    {"rows of ldmatrix beside each other", load_rows<16>},
    {"rows of ldmatrix 128 bytes apart", load_rows<128>},
    {"rows of ldmatrix 256 bytes apart", load_rows<256>},
    {"rows of ldmatrix 144 bytes apart", load_rows<144>},
    {"rows of ldmatrix in a swizzled tile", load_swizzled_rows},
    {"rows of stmatrix 64 bytes apart", store_rows<64>},
    {"copies 16 bytes apart", copy_strided<16>},
    {"copies 512 bytes apart", copy_strided<512>},
    {"a column of words stored", store_column},
    {"lanes that skip an access, and meet", load_diverged<true>},
    {"lanes that skip an access", load_diverged<false>},
};

}  // namespace

int main(int, char** arguments) {
  for (const auto& pattern : kPatterns) {
    if (std::string(arguments[1]) != pattern.name) continue;
    alignas(16) static int out[kLanes];
    LaunchShape shape;
    shape.threads = kLanes;
    shape.shared_bytes = kSharedBytes;
    launch(pattern.kernel, shape, static_cast<int*>(out));
    cudaDeviceSynchronize();
    return 0;
  }
  std::fprintf(stderr, "no such pattern: %s\n", arguments[1]);
  return 2;
}
