// Toy kernels. The command line names a bug, and a kernel runs with that bug in it; with "none" all
// kernels run without a bug. The exit code is 0 if the result is right. The executor must notice
// every bug.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "common/float16.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"

namespace {

using namespace pylora;
using namespace pylora::cuda;

constexpr int kThreads = 64;

struct Memory {
  int values[kThreads];
};

// This kernel and the next ones compute out[i] = in[kThreads - 1 - i]. This one reverses three
// times through shared memory.
template <bool kFirstBarrier, bool kSecondBarrier>
void reverse_twice(const int* in, int* out) {
  Memory& shared = shared_memory<Memory>();
  const unsigned thread = threadIdx.x;
  int value = in[thread];
  for (int round = 0; round < 3; ++round) {
    shared.values[thread] = value;
    if (kFirstBarrier) __syncthreads();
    value = shared.values[kThreads - 1 - thread];
    if (kSecondBarrier) __syncthreads();  // without it a thread may write before another has read
  }
  out[thread] = value;
}

// Reverses within each warp.
template <bool kBarrier>
void reverse_in_warps(const int* in, int* out) {
  Memory& shared = shared_memory<Memory>();
  const unsigned thread = threadIdx.x;
  shared.values[thread ^ 31] = in[thread];
  if (kBarrier) __syncwarp();
  out[thread ^ 32] = shared.values[thread];
}

// Reverses what asynchronous copies of 16 bytes bring.
template <bool kWait, bool kBarrier, int kPending>
void reverse_copied(const int* in, int* out) {
  auto* copied = reinterpret_cast<int*>(dynamic_shared_memory());
  const unsigned thread = threadIdx.x;
  if (thread < kThreads / 4) copy_async_16(copied + 4 * thread, in + 4 * thread);
  copy_async_commit();
  if (kWait) copy_async_wait<kPending>();
  if (kBarrier) __syncthreads();
  out[thread] = copied[kThreads - 1 - thread];
}

// Steps kBeyond elements outside shared memory.
template <int kBeyond>
void step_outside(const int* in, int* out) {
  auto* shared = reinterpret_cast<int*>(dynamic_shared_memory());
  const unsigned thread = threadIdx.x;
  shared[thread + kBeyond] = in[thread];
  __syncthreads();
  out[thread] = shared[kThreads - 1 - thread + kBeyond];
}

// Steps kBeyond elements outside global memory.
template <int kBeyond>
void step_outside_global(const int* in, int* out) {
  out[threadIdx.x] = in[kThreads - 1 - threadIdx.x + kBeyond];
}

// If kDiverge, lanes of one warp meet in different operations.
template <bool kDiverge>
void shuffle_reverse(const int* in, int* out) {
  const unsigned thread = threadIdx.x;
  int value = in[thread];
  if (kDiverge && thread % 2 == 0) {
    value = shuffle(value, static_cast<int>(31 - thread));
  } else {
    value = shuffle_xor(value, 31);
  }
  out[thread ^ 32] = value;
}

// One warp computes out [16, 8] = A [16, 16] B [16, 8] with small integers in fp16.
constexpr int kA = 16 * 16, kB = 16 * 8;
template <bool kSwapA, bool kSwapB, bool kTransposeB>
void multiply(const uint16_t* in, float* out) {
  auto* a_rows = reinterpret_cast<uint16_t*>(dynamic_shared_memory());
  uint16_t* b_rows = a_rows + kA;
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < kA + kB; i += kLanes) a_rows[i] = in[i];
  __syncwarp();
  // ldmatrix loads four 8x8 matrices: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15.
  const int row = lane % 8 + 8 * (kSwapA ? lane / 16 : lane / 8 % 2);
  const int column = 8 * (kSwapA ? lane / 8 % 2 : lane / 16);
  uint32_t a[4], b[4];
  load_matrices(a, a_rows + row * 16 + column);
  const uint16_t* b_row = b_rows + lane % 16 * 8;
  if (kTransposeB) {
    load_matrices_transposed(b, b_row);
  } else {
    load_matrices(b, b_row);
  }
  float d[4] = {};
  mma_16x8x16<__half>(d, a, b[kSwapB ? 1 : 0], b[kSwapB ? 0 : 1]);
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

void double_values(const int* in, int* out) {
  start_dependent_kernel();
  out[threadIdx.x] = 2 * in[threadIdx.x];
}
template <bool kWait>
void add_one(const int* in, int* out) {
  if (kWait) wait_for_previous_kernel();
  out[threadIdx.x] = in[threadIdx.x] + 1;
}

template <class Kernel>
bool is_two_x_plus_one(Kernel* second_kernel) {
  std::vector<int> in(kThreads, 3), between(kThreads, -1), out(kThreads, -1);
  LaunchShape shape;
  shape.threads = kThreads;
  launch(double_values, shape, in.data(), between.data());
  shape.dependent = true;
  launch(second_kernel, shape, between.data(), out.data());
  cudaDeviceSynchronize();
  return out == std::vector<int>(kThreads, 7);
}

template <class Kernel>
bool is_reversed(Kernel* kernel) {
  std::vector<int> in(kThreads), out(kThreads, -1);
  for (int i = 0; i < kThreads; ++i) in[static_cast<size_t>(i)] = 100 + i;
  cudaLaunchConfig_t config = {};
  config.blockDim.x = kThreads;
  config.dynamicSmemBytes = sizeof(Memory);
  cudaLaunchKernelEx(&config, kernel, in.data(), out.data());
  cudaDeviceSynchronize();
  for (int i = 0; i < kThreads; ++i) {
    if (out[static_cast<size_t>(i)] != 100 + kThreads - 1 - i) return false;
  }
  return true;
}

template <class Kernel>
bool is_product(Kernel* kernel) {
  std::vector<uint16_t> in(kA + kB);
  std::vector<int> integers(kA + kB);
  for (size_t i = 0; i < in.size(); ++i) {
    integers[i] = static_cast<int>(i * i % 23) - 11;
    in[i] = from_float<Half>(static_cast<float>(integers[i])).bits;
  }
  std::vector<float> out(16 * 8, NAN);
  cudaLaunchConfig_t config = {};
  config.blockDim.x = kLanes;
  config.dynamicSmemBytes = sizeof(uint16_t) * (kA + kB);
  cudaLaunchKernelEx(&config, kernel, in.data(), out.data());
  cudaDeviceSynchronize();
  for (size_t m = 0; m < 16; ++m) {
    for (size_t n = 0; n < 8; ++n) {
      int sum = 0;
      for (size_t k = 0; k < 16; ++k) sum += integers[16 * m + k] * integers[kA + 8 * k + n];
      if (out[8 * m + n] != static_cast<float>(sum)) return false;
    }
  }
  return true;
}

bool result_is_right(const std::string& bug) {
  if (bug == "none") {
    return is_reversed(reverse_twice<true, true>) && is_reversed(reverse_in_warps<true>) &&
           is_reversed(reverse_copied<true, true, 0>) && is_reversed(step_outside<0>) &&
           is_reversed(step_outside_global<0>) && is_reversed(shuffle_reverse<false>) &&
           is_product(multiply<false, false, true>) && is_two_x_plus_one(add_one<true>);
  }
  if (bug == "missing __syncthreads") return is_reversed(reverse_twice<false, true>);
  if (bug == "missing __syncthreads before the next write") {
    return is_reversed(reverse_twice<true, false>);
  }
  if (bug == "missing __syncwarp") return is_reversed(reverse_in_warps<false>);
  if (bug == "missing cp.async wait") return is_reversed(reverse_copied<false, true, 0>);
  if (bug == "cp.async waits for a group too few")
    return is_reversed(reverse_copied<true, true, 1>);
  if (bug == "missing barrier after the cp.async wait") {
    return is_reversed(reverse_copied<true, false, 0>);
  }
  if (bug == "step outside shared memory") return is_reversed(step_outside<1>);
  if (bug == "step outside global memory") return is_reversed(step_outside_global<1>);
  if (bug == "lanes in different shuffles") return is_reversed(shuffle_reverse<true>);
  if (bug == "missing wait for the kernel before") return is_two_x_plus_one(add_one<false>);
  if (bug == "wrong map of A") return is_product(multiply<true, false, true>);
  if (bug == "wrong map of B") return is_product(multiply<false, true, true>);
  if (bug == "B not transposed") return is_product(multiply<false, false, false>);
  std::fprintf(stderr, "no such bug: %s\n", bug.c_str());
  std::exit(2);
}

}  // namespace

int main(int, char** arguments) {
  if (result_is_right(arguments[1])) return 0;
  std::fprintf(stderr, "the result is wrong\n");
  return 1;
}
