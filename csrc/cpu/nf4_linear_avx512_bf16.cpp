#include "cpu/nf4_linear_impl.h"
#include "cpu/vec_avx512_bf16.h"

namespace pylora::cpu {

void run_linear_avx512_bf16(const NF4LinearArgs& args) {
  run_linear_as<Avx512Bf16, Bf16Mac, BFloat16>(args);
}

}  // namespace pylora::cpu
