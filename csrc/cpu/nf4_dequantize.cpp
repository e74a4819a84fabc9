#include "cpu/nf4_dequantize.h"

#include "common/float16.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace pylora::cpu {
namespace {

// With fewer elements than this, a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;

// Decodes elements [begin, end) to `out`. They lie in one block; `begin` is even.
template <class T>
void dequantize_range(const NF4Matrix& weight, int64_t begin, int64_t end, T* out) {
  const float absmax = weight.absmax_at(begin / weight.blocksize);
  T values[kNF4Size];
  for (int i = 0; i < kNF4Size; ++i) values[i] = from_float<T>(kNF4Code[i] * absmax);
  const uint8_t* packed = weight.qweight + begin / 2;
  const int64_t count = end - begin;
  for (int64_t j = 0; j < count / 2; ++j) {
    out[2 * j] = values[packed[j] >> 4];
    out[2 * j + 1] = values[packed[j] & 0xF];
  }
  if (count % 2 != 0) out[count - 1] = values[packed[count / 2] >> 4];
}

// The address of an element of a tensor.
void* address(void* data, DType dtype, int64_t element) {
  return static_cast<char*>(data) + element * dtype_size(dtype);
}

constexpr KernelTable<DequantizeBlocks> kDequantizeBlocks{
    nf4_dequantize_blocks_portable,
    PYLORA_X86_KERNEL(nf4_dequantize_blocks_avx2),
    PYLORA_X86_KERNEL(nf4_dequantize_blocks_avx512),
};

}  // namespace

void nf4_dequantize_blocks_portable(const NF4Matrix& weight, DType out_dtype, int64_t begin,
                                    int64_t end, void* out) {
  visit_dtype(out_dtype, [&](auto element) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * weight.blocksize;
      dequantize_range(weight, first, first + weight.blocksize,
                       static_cast<decltype(element)*>(out) + first - begin * weight.blocksize);
    }
  });
}

void nf4_dequantize(const NF4Matrix& weight, DType out_dtype, void* out) {
  DequantizeBlocks* dequantize = kDequantizeBlocks.choose(false);
  const int64_t numel = weight.numel();
  const int64_t blocksize = weight.blocksize;
  const int64_t whole = numel / blocksize;
  parallel_for(0, whole, ceil_div(kGrain, blocksize), [&](int64_t begin, int64_t end) {
    dequantize(weight, out_dtype, begin, end, address(out, out_dtype, begin * blocksize));
  });
  if (whole * blocksize == numel) return;
  visit_dtype(out_dtype, [&](auto element) {
    dequantize_range(weight, whole * blocksize, numel,
                     static_cast<decltype(element)*>(out) + whole * blocksize);
  });
}

void nf4_dequantize_panel(const NF4Matrix& weight, int64_t row, int64_t rows, int64_t col,
                          int64_t cols, DType out_dtype, void* out) {
  DequantizeBlocks* dequantize = kDequantizeBlocks.choose(false);
  const int64_t blocks = cols / weight.blocksize;
  parallel_for(0, rows, ceil_div(kGrain, cols), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t first = ((row + r) * weight.cols + col) / weight.blocksize;
      dequantize(weight, out_dtype, first, first + blocks, address(out, out_dtype, r * cols));
    }
  });
}

}  // namespace pylora::cpu
