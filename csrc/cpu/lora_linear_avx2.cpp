#include "cpu/lora_linear_impl.h"
#include "cpu/vec_avx2.h"

namespace pylora::cpu {

void project_avx2(const TokenMatrix& x, const AdapterFactor& factor, const float* bias,
                  float* out) {
  project_on<Avx2>(x, factor, bias, out);
}

void gather_avx2(const TokenMatrix& x, const float* low, const AdapterFactor& gradient,
                 float* sums) {
  gather_on<Avx2>(x, low, gradient, sums);
}

}  // namespace pylora::cpu
