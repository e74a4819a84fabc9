// GPU side of the NF4 ops: tensor -> checks -> stream -> launcher.
#include "cuda/bind.h"

#include <torch/headeronly/util/shim_utils.h>

#include <tuple>
#include <vector>

#include "common/boxed.h"
#include "cuda/nf4/nf4_dequantize.cuh"
#include "cuda/nf4/nf4_quantize.cuh"

// Only a CUDA build of torch has it. Weak, so that one extension also loads beside a CPU-only
// torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace pylora::cuda {

cudaStream_t current_stream(int32_t device_index) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "a CUDA tensor needs a torch built with CUDA, got one without");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

namespace {

std::tuple<Tensor, Tensor> nf4_quantize(Tensor& weight, int64_t blocksize) {
  const DType dtype = to_dtype("weight", weight.scalar_type());
  check_on_cuda("weight", weight);
  check_blocksize(blocksize);
  make_contiguous(weight);
  const int64_t numel = weight.numel();
  const Device device(weight);
  Tensor qweight = torch::stable::new_empty(weight, {ceil_div(numel, 2)}, ScalarType::Byte);
  Tensor absmax = torch::stable::new_empty(weight, {ceil_div(numel, blocksize)}, ScalarType::Float);
  if (numel == 0) return {qweight, absmax};
  check_cuda_call("nf4_quantize",
                  nf4_quantize_cuda(weight.const_data_ptr(), dtype, numel, blocksize,
                                    qweight.mutable_data_ptr<uint8_t>(),
                                    absmax.mutable_data_ptr<float>(), device.stream()));
  return {qweight, absmax};
}

Tensor nf4_dequantize(NF4Tensors& weight, const std::vector<int64_t>& shape, ScalarType dtype) {
  const DType out_dtype = to_dtype("dtype", dtype);
  const int64_t numel = checked_numel("shape", shape);
  const NF4Arguments arguments = weight.check(1, numel);
  check_on_cuda("qweight", weight.qweight);
  const Device device(weight.qweight);
  Tensor out = torch::stable::new_empty(weight.qweight, shape, dtype);
  if (numel == 0) return out;
  check_cuda_call("nf4_dequantize",
                  nf4_dequantize_cuda(arguments.matrix, arguments.offset, out_dtype, numel,
                                      out.mutable_data_ptr(), device.stream()));
  return out;
}

// Fills a matrix whose rows may lie apart, so that other columns can stand beside the weight's.
void nf4_dequantize_into(NF4Tensors& weight, const Tensor& out) {
  const DType out_dtype = to_dtype("out", out.scalar_type());
  check_dim("out", out, 2);
  const int64_t rows = out.size(0), cols = out.size(1);
  const int64_t stride = rows > 1 ? out.stride(0) : cols;
  STD_TORCH_CHECK((cols <= 1 || out.stride(1) == 1) && stride >= cols,
                  "out must have rows of contiguous elements that do not overlap, got strides ",
                  to_string(out.strides()), " for shape ", to_string(out.sizes()));
  const NF4Arguments arguments = weight.check(rows, cols);
  check_on_cuda("qweight", weight.qweight);
  check_device("out", out, weight.qweight, "qweight");
  if (arguments.matrix.numel() == 0) return;
  const Device device(out);
  check_cuda_call("nf4_dequantize_into",
                  nf4_dequantize_cuda(arguments.matrix, arguments.offset, out_dtype, stride,
                                      out.mutable_data_ptr(), device.stream()));
}

}  // namespace
}  // namespace pylora::cuda

STABLE_TORCH_LIBRARY_IMPL(pylora_C, CUDA, m) {
  m.impl("nf4_quantize", pylora::boxed<pylora::cuda::nf4_quantize>);
  m.impl("nf4_dequantize", pylora::boxed<pylora::cuda::nf4_dequantize>);
  m.impl("nf4_dequantize_into", pylora::boxed<pylora::cuda::nf4_dequantize_into>);
}
