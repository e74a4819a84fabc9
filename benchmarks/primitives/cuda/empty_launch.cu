// A launch of an empty kernel behind a C interface, for ctypes: what a call costs that goes from
// Python to a kernel without torch in between.
#include <cuda_runtime.h>

namespace {
__global__ void nothing() {}
}  // namespace

// Returns a cudaError_t.
extern "C" int primitives_launch_empty(void* stream) {
  nothing<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>();
  return static_cast<int>(cudaGetLastError());
}

// In words, for what primitives_launch_empty returned.
extern "C" const char* primitives_error_name(int error) {
  return cudaGetErrorName(static_cast<cudaError_t>(error));
}
