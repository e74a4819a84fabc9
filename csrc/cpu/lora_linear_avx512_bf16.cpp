#include "cpu/lora_linear_bf16_impl.h"
#include "cpu/vec_avx512_bf16.h"

namespace pylora::cpu {

void project_avx512_bf16(const TokenMatrix& x, const AdapterFactor& factor, const float* bias,
                         float* out) {
  project_bf16<Avx512Bf16, Bf16Mac>(x, factor, bias, out);
}

void gather_avx512_bf16(const TokenMatrix& x, const float* low, const AdapterFactor& gradient,
                        float* sums) {
  gather_bf16<Avx512Bf16, Bf16Mac>(x, low, gradient, sums);
}

}  // namespace pylora::cpu
