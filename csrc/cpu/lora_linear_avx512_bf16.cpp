#include "cpu/lora_linear_bf16_impl.h"
#include "cpu/vec_avx512_bf16.h"

namespace pylora::cpu {

void gather_avx512_bf16(const TokenMatrix& x, const float* low, const AdapterFactor& gradient,
                        float* sums) {
  gather_bf16<Avx512Bf16, Bf16Mac>(x, low, gradient, sums);
}

}  // namespace pylora::cpu
