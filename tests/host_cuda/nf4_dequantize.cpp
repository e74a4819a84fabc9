// Runs the CUDA kernel on the CPU: arguments from standard input, the weight to standard output.
// Every array has a heap block of its own size, so that the address sanitizer sees each step
// outside.
#include "cuda/nf4_dequantize.cuh"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

template <class T>
T* read_array(int64_t count, int64_t misalign = 0) {
  // Freed by the end of the program; `misalign` is in elements.
  T* memory = static_cast<T*>(std::malloc(sizeof(T) * static_cast<size_t>(count + misalign)));
  const size_t wanted = static_cast<size_t>(count);
  if (std::fread(memory + misalign, sizeof(T), wanted, stdin) != wanted) std::abort();
  return memory + misalign;
}

}  // namespace

int main() {
  const int64_t* header = read_array<int64_t>(6);
  const int64_t numel = header[0];
  const int64_t misalign = header[5];
  const auto dtype = static_cast<pylora::DType>(header[4]);
  pylora::NF4Matrix weight;
  weight.rows = 1;
  weight.cols = numel;
  weight.blocksize = header[1];
  weight.nested_blocksize = header[2];
  const float* offset = nullptr;
  weight.qweight = read_array<uint8_t>(pylora::ceil_div(numel, 2), misalign);
  const int64_t blocks = weight.num_blocks();
  if (header[3] != 0) {
    weight.absmax_q = read_array<uint8_t>(blocks);
    weight.nested_absmax = read_array<float>(pylora::ceil_div(blocks, weight.nested_blocksize));
    weight.nested_code = read_array<float>(256);
    offset = read_array<float>(1);
  } else {
    weight.absmax = read_array<float>(blocks);
  }
  const size_t bytes = static_cast<size_t>(numel * pylora::dtype_size(dtype));
  void* out = std::malloc(bytes);
  std::memset(out, 0xFF, bytes);  // NaN in every dtype
  if (pylora::nf4_dequantize_cuda(weight, offset, dtype, out, nullptr) != cudaSuccess) return 1;
  std::fwrite(out, 1, bytes, stdout);
}
