#include "cpu/dense_linear_impl.h"
#include "cpu/vec_avx512_bf16.h"

namespace pylora::cpu {

void dense_linear_avx512_bf16(const DenseLinearArgs& args) {
  dense_linear_as<Avx512Bf16, Bf16Mac, BFloat16>(args);
}

}  // namespace pylora::cpu
