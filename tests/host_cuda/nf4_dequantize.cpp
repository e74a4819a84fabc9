// Runs the CUDA kernel on the CPU: arguments from standard input, the weight to standard output.
#include "cuda/nf4_dequantize.cuh"

#include "stdin_arrays.h"

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
  const int64_t bytes = numel * pylora::dtype_size(dtype);
  void* out = make_output(bytes);
  if (pylora::nf4_dequantize_cuda(weight, offset, dtype, out, nullptr) != cudaSuccess) return 1;
  cudaDeviceSynchronize();
  write_output(out, bytes);
}
