// Stands in for the driver: cuTensorMapEncodeTiled, and the function that finds it. It makes the
// demands of its documentation (CUDA 13.0). A refusal names the demand that is not met, and
// accepted arguments go into the report.
#include <cuda.h>

#include <cstring>

#include "cuda/hopper/tensor_map.cuh"

namespace {

int bytes_of(CUtensorMapDataType type) {
  if (type == CU_TENSOR_MAP_DATA_TYPE_UINT8) return 1;
  return type == CU_TENSOR_MAP_DATA_TYPE_UINT16 ? 2 : 4;
}

int bytes_of(CUtensorMapSwizzle swizzle) {
  return swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128 : 32;
}

}  // namespace

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion l2_promotion,
                                CUtensorMapFloatOOBfill out_of_bounds) {
  constexpr cuuint64_t kLargestSize = cuuint64_t{1} << 32, kStrideEnd = cuuint64_t{1} << 40;
  const auto item = static_cast<cuuint64_t>(bytes_of(type));
  const auto swizzle_bytes = static_cast<cuuint64_t>(bytes_of(swizzle));
  const auto is_multiple = [](const void* pointer, uintptr_t of) {
    return reinterpret_cast<uintptr_t>(pointer) % of == 0;
  };
  const auto both = [](const auto* values, uint64_t last) {
    return values[0] >= 1 && values[0] <= last && values[1] >= 1 && values[1] <= last;
  };
  const struct {
    bool met;
    const char* demand;
  } demands[] = {
      {rank == 2, "tensorRank must be 2: only matrices are described here"},
      {is_multiple(map, 64), "tensorMap must be aligned to 64 bytes"},
      {is_multiple(address, 16), "globalAddress must be aligned to 16 bytes"},
      {both(sizes, kLargestSize), "globalDim must be from 1 to 2^32"},
      {strides[0] % 16 == 0, "globalStrides must be multiples of 16"},
      {strides[0] < kStrideEnd, "globalStrides must be less than 2^40"},
      {strides[0] >= sizes[0] * item, "globalStrides must be no shorter than a row"},
      {both(box, 256), "boxDim must be from 1 to 256"},
      {box[0] * item % 16 == 0, "boxDim[0] must be a multiple of 16 bytes"},
      {both(element_strides, 8), "elementStrides must be from 1 to 8"},
      {interleave == CU_TENSOR_MAP_INTERLEAVE_NONE, "interleave must be none for a matrix"},
      {swizzle != CU_TENSOR_MAP_SWIZZLE_NONE,
       "swizzle must not be none, since the kernels' tiles have one"},
      {box[0] * item <= swizzle_bytes, "boxDim[0] must be no longer than the swizzle"},
      {out_of_bounds == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
       "oobFill must be none, which fills with 0"},
  };
  for (const auto& demand : demands) {
    if (demand.met) continue;
    std::fprintf(stderr, "cuTensorMapEncodeTiled: %s\n", demand.demand);
    return CUDA_ERROR_INVALID_VALUE;
  }
  pylora::cuda::HostTensorMap out;
  out.base = static_cast<const uint8_t*>(address);
  out.rows = static_cast<int64_t>(sizes[1]);
  out.cols = static_cast<int64_t>(sizes[0]);
  out.pitch = static_cast<int64_t>(strides[0]);
  out.item = static_cast<int32_t>(item);
  out.box_rows = static_cast<int32_t>(box[1]);
  out.box_cols = static_cast<int32_t>(box[0]);
  out.swizzle = swizzle_bytes == 128 ? pylora::cuda::Swizzle::k128 : pylora::cuda::Swizzle::k32;
  std::memcpy(map, &out, sizeof(out));
  host_cuda::report.tensor_maps.push_back({type, swizzle, l2_promotion, sizes[0], sizes[1],
                                           strides[0], box[0], box[1], element_strides[0],
                                           element_strides[1]});
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long /*flags*/,
                                             cudaDriverEntryPointQueryResult* found) {
  constexpr unsigned kFirst = 12000;  // the first CUDA version with the copy engine
  const bool is_known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0 && version >= kFirst;
  *function = is_known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *found = is_known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
