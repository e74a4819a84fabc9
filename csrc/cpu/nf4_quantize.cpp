#include "cpu/nf4_quantize.h"

#include <algorithm>
#include <cmath>

#include "common/float16.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace pylora::cpu {
namespace {

// With fewer elements than this, a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;

uint32_t nearest_code(float scaled) {
  uint32_t code = 0;
  for (int i = 0; i < kNF4Size - 1; ++i) code += scaled > nf4_midpoint(i) ? 1 : 0;
  return code;
}

template <class T>
float max_magnitude(const T* x, int64_t count) {
  float largest = 0.0f;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(to_float(x[i])));
  return largest;
}

template <class T>
void quantize_blocks(const T* weight, int64_t begin, int64_t end, int64_t blocksize,
                     uint8_t* qweight, float* absmax) {
  for (int64_t block = begin; block < end; ++block) {
    const T* x = weight + block * blocksize;
    uint8_t* packed = qweight + block * blocksize / 2;
    absmax[block] = max_magnitude(x, blocksize);
    const float inverse = 1.0f / std::max(absmax[block], kNF4MinAbsmax);
    for (int64_t j = 0; j < blocksize / 2; ++j) {
      packed[j] = nf4_pack(nearest_code(to_float(x[2 * j]) * inverse),
                           nearest_code(to_float(x[2 * j + 1]) * inverse));
    }
  }
}

template <class T>
void quantize_short_block(const T* x, int64_t count, uint8_t* packed, float* absmax) {
  *absmax = std::max(max_magnitude(x, count), kNF4MinAbsmax);
  for (int64_t i = 0; i < count; i += 2) {
    const uint32_t even = nearest_code(to_float(x[i]) / *absmax);
    const uint32_t odd = i + 1 < count ? nearest_code(to_float(x[i + 1]) / *absmax) : kNF4ZeroCode;
    packed[i / 2] = nf4_pack(even, odd);
  }
}

constexpr KernelTable<QuantizeBlocks> kQuantizeBlocks{
    nf4_quantize_blocks_portable,
    PYLORA_X86_KERNEL(nf4_quantize_blocks_avx2),
    PYLORA_X86_KERNEL(nf4_quantize_blocks_avx512),
};

}  // namespace

void nf4_quantize_blocks_portable(const void* weight, DType dtype, int64_t begin, int64_t end,
                                  int64_t blocksize, uint8_t* qweight, float* absmax) {
  visit_dtype(dtype, [&](auto element) {
    quantize_blocks(static_cast<const decltype(element)*>(weight), begin, end, blocksize, qweight,
                    absmax);
  });
}

void nf4_quantize(const void* weight, DType dtype, int64_t numel, int64_t blocksize,
                  uint8_t* qweight, float* absmax) {
  QuantizeBlocks* quantize = kQuantizeBlocks.choose(false);
  const int64_t whole = numel / blocksize;
  parallel_for(0, whole, ceil_div(kGrain, blocksize), [&](int64_t begin, int64_t end) {
    quantize(weight, dtype, begin, end, blocksize, qweight, absmax);
  });
  if (whole * blocksize == numel) return;
  visit_dtype(dtype, [&](auto element) {
    const auto* rest = static_cast<const decltype(element)*>(weight) + whole * blocksize;
    quantize_short_block(rest, numel - whole * blocksize, qweight + whole * blocksize / 2,
                         absmax + whole);
  });
}

}  // namespace pylora::cpu
