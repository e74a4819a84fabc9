#include "cpu/nf4_linear_impl.h"
#include "cpu/vec_avx512_bf16.h"

namespace pylora::cpu {

void run_linear_avx512_bf16(const LinearProblem& problem) {
  run_linear_as<Avx512Bf16, Bf16Mac, BFloat16>(problem);
}

}  // namespace pylora::cpu
