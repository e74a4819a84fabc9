// The twin of csrc/cuda/tensor_map.cu, with the driver's limits.
#include "cuda/tensor_map.cuh"

namespace pylora::cuda {

cudaError_t encode_tensor_map(const TiledMatrix& matrix, TensorMap* map) {
  HostTensorMap out;
  out.base = static_cast<const uint8_t*>(matrix.data);
  out.rows = matrix.rows;
  out.cols = matrix.cols;
  out.pitch = matrix.pitch;
  out.item = matrix.item_bytes;
  out.box_rows = matrix.tile_rows;
  out.swizzle = matrix.swizzle;
  out.box_cols = (matrix.swizzle == Swizzle::k128 ? 128 : 32) / matrix.item_bytes;
  const bool valid = reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.rows > 0 &&
                     matrix.cols > 0 && matrix.pitch % 16 == 0 && matrix.tile_rows >= 1 &&
                     matrix.tile_rows <= 256;
  if (!valid) return cudaErrorInvalidValue;
  std::memcpy(map, &out, sizeof(out));
  return cudaSuccess;
}

}  // namespace pylora::cuda
