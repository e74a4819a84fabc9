// CPU side of the NF4 ops: tensor -> checks -> kernel. Also gives the kernels torch's thread pool.
#include "cpu/bind.h"

#include <torch/headeronly/util/shim_utils.h>

#include <tuple>
#include <vector>

#include "common/boxed.h"
#include "cpu/huge_pages.h"
#include "cpu/nf4_dequantize.h"
#include "cpu/nf4_quantize.h"
#include "cpu/parallel.h"

namespace pylora::cpu {

void parallel_ranges(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context) {
  if (begin >= end) return;
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

namespace {

std::tuple<Tensor, Tensor> nf4_quantize_cpu(Tensor& weight, int64_t blocksize) {
  const DType dtype = to_dtype("weight", weight.scalar_type());
  check_blocksize(blocksize);
  make_contiguous(weight);
  const int64_t numel = weight.numel();
  Tensor qweight = torch::stable::new_empty(weight, {ceil_div(numel, 2)}, ScalarType::Byte);
  Tensor absmax = torch::stable::new_empty(weight, {ceil_div(numel, blocksize)}, ScalarType::Float);
  nf4_quantize(weight.const_data_ptr(), dtype, numel, blocksize,
               qweight.mutable_data_ptr<uint8_t>(), absmax.mutable_data_ptr<float>());
  return {qweight, absmax};
}

Tensor nf4_dequantize_cpu(NF4Tensors& weight, const std::vector<int64_t>& shape, ScalarType dtype) {
  const DType out_dtype = to_dtype("dtype", dtype);
  const int64_t numel = checked_numel("shape", shape);
  const NF4Matrix matrix = to_matrix(weight, 1, numel);
  Tensor out = torch::stable::new_empty(weight.qweight, shape, dtype);
  advise_huge_pages(out.mutable_data_ptr(), numel * dtype_size(out_dtype));
  nf4_dequantize(matrix, out_dtype, out.mutable_data_ptr());
  return out;
}

void nf4_dequantize_panel_cpu(NF4Tensors& weight, int64_t out_features, int64_t in_features,
                              int64_t row, int64_t col, const Tensor& out) {
  const DType out_dtype = to_dtype("out", out.scalar_type());
  check_dim("out", out, 2);
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous, got strides ",
                  to_string(out.strides()), " for shape ", to_string(out.sizes()));
  const int64_t rows = out.size(0), cols = out.size(1);
  const NF4Matrix matrix = to_matrix(weight, out_features, in_features);
  const int64_t blocksize = matrix.blocksize;
  STD_TORCH_CHECK(in_features % blocksize == 0 && col % blocksize == 0 && cols % blocksize == 0,
                  "in_features, col and the columns of out must be multiples of the blocksize ",
                  blocksize, ", got ", in_features, ", ", col, " and ", cols);
  STD_TORCH_CHECK(row >= 0 && row + rows <= out_features && col >= 0 && col + cols <= in_features,
                  "row, col and out must name a part of the weight [", out_features, ", ",
                  in_features, "], got row ", row, ", col ", col, " and out ",
                  to_string(out.sizes()));
  if (rows == 0 || cols == 0) return;
  advise_huge_pages(out.mutable_data_ptr(), rows * cols * dtype_size(out_dtype));
  nf4_dequantize_panel(matrix, row, rows, col, cols, out_dtype, out.mutable_data_ptr());
}

}  // namespace
}  // namespace pylora::cpu

STABLE_TORCH_LIBRARY_IMPL(pylora_C, CPU, m) {
  m.impl("nf4_quantize", pylora::boxed<pylora::cpu::nf4_quantize_cpu>);
  m.impl("nf4_dequantize", pylora::boxed<pylora::cpu::nf4_dequantize_cpu>);
  m.impl("nf4_dequantize_panel", pylora::boxed<pylora::cpu::nf4_dequantize_panel_cpu>);
}
