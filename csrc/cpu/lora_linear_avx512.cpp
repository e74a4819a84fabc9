#include "cpu/lora_linear_impl.h"
#include "cpu/vec_avx512.h"

namespace pylora::cpu {

void project_avx512(const TokenMatrix& x, const AdapterFactor& factor, const float* bias,
                    float* out) {
  project_on<Avx512>(x, factor, bias, out);
}

void gather_avx512(const TokenMatrix& x, const float* low, const AdapterFactor& gradient,
                   float* sums) {
  gather_on<Avx512>(x, low, gradient, sums);
}

}  // namespace pylora::cpu
