// Launches an empty kernel through a C interface for ctypes. It shows what a call from Python to a
// kernel costs without torch.
#include <cuda_runtime.h>

namespace {
__global__ void nothing() {}
}  // namespace

// Returns a cudaError_t.
extern "C" int primitives_launch_empty(void* stream) {
  nothing<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>();
  return static_cast<int>(cudaGetLastError());
}

// Returns the name of an error that primitives_launch_empty returned.
extern "C" const char* primitives_error_name(int error) {
  return cudaGetErrorName(static_cast<cudaError_t>(error));
}
