// Runs the CUDA kernel on the CPU. It reads the arguments from standard input and writes qweight
// and absmax to standard output.
#include "cuda/nf4/nf4_quantize.cuh"

#include "stdin_arrays.h"

int main() {
  const int64_t* header = read_array<int64_t>(4);  // numel, blocksize, dtype, misalign
  const int64_t numel = header[0];
  const auto dtype = static_cast<pylora::DType>(header[2]);
  const int64_t size = pylora::dtype_size(dtype);
  const uint8_t* weight = read_array<uint8_t>(numel * size, header[3] * size);
  const int64_t packed = pylora::ceil_div(numel, 2);
  const int64_t blocks = pylora::ceil_div(numel, header[1]);
  void* qweight = make_output(packed);
  void* absmax = make_output(4 * blocks);
  if (pylora::cuda::nf4_quantize_cuda(weight, dtype, numel, header[1],
                                      static_cast<uint8_t*>(qweight), static_cast<float*>(absmax),
                                      nullptr) != cudaSuccess) {
    return 1;
  }
  cudaDeviceSynchronize();
  write_output(qweight, packed);
  write_output(absmax, 4 * blocks);
}
