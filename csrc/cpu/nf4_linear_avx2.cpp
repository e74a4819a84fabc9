#include "cpu/nf4_linear_impl.h"
#include "cpu/vec_avx2.h"

namespace pylora::cpu {

void run_linear_avx2(const LinearProblem& problem) {
  visit_dtype(problem.dtype,
              [&](auto element) { run_linear_as<Avx2, F32Mac, decltype(element)>(problem); });
}

}  // namespace pylora::cpu
