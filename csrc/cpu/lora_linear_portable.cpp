#include "cpu/lora_linear_impl.h"
#include "cpu/vec_portable.h"

namespace pylora::cpu {

void project_portable(const TokenMatrix& x, const AdapterFactor& factor, const float* bias,
                      float* out) {
  project_on<Portable>(x, factor, bias, out);
}

void gather_portable(const TokenMatrix& x, const float* low, const AdapterFactor& gradient,
                     float* sums) {
  gather_on<Portable>(x, low, gradient, sums);
}

}  // namespace pylora::cpu
