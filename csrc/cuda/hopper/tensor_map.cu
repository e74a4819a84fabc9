#include <cuda.h>

#include <atomic>
#include <cstring>

#include "cuda/hopper/tensor_map.cuh"

namespace pylora::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver that is loaded, once; an error if it is older than the copy engine. Threads that
// come first at the same time find the same function.
cudaError_t find_encoder(Encode* encode) {
  static std::atomic<Encode> known = nullptr;
  *encode = known.load();
  if (*encode != nullptr) return cudaSuccess;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  constexpr unsigned kFirstVersion = 12000;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, kFirstVersion, cudaEnableDefault, &found);
#else
  static_assert(CUDART_VERSION >= kFirstVersion);
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess || function == nullptr) return cudaErrorNotSupported;
  *encode = reinterpret_cast<Encode>(function);
  known.store(*encode);
  return cudaSuccess;
}

CUtensorMapDataType element_type(int item_bytes) {
  if (item_bytes == 1) return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  return item_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
}

}  // namespace

cudaError_t encode_tensor_map(const TiledMatrix& matrix, TensorMap* map) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  static_assert(alignof(TensorMap) >= alignof(CUtensorMap));
  Encode encode = nullptr;
  const cudaError_t error = find_encoder(&encode);
  if (error != cudaSuccess) return error;
  const int swizzle_bytes = matrix.swizzle == Swizzle::k128 ? 128 : 32;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.cols),
                              static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t pitches[] = {static_cast<cuuint64_t>(matrix.pitch)};
  const cuuint32_t tile[] = {static_cast<cuuint32_t>(swizzle_bytes / matrix.item_bytes),
                             static_cast<cuuint32_t>(matrix.tile_rows)};
  const cuuint32_t steps[] = {1, 1};
  CUtensorMap encoded;
  const CUresult result = encode(
      &encoded, element_type(matrix.item_bytes), 2, const_cast<void*>(matrix.data), sizes, pitches,
      tile, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      matrix.swizzle == Swizzle::k128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_32B,
      // Short rows of qweight share a line of L2 with those of the next steps.
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;
  std::memcpy(map, &encoded, sizeof(encoded));
  return cudaSuccess;
}

}  // namespace pylora::cuda
