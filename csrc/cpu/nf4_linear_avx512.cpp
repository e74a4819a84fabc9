#include "cpu/nf4_linear_impl.h"
#include "cpu/vec_avx512.h"

namespace pylora {

void run_linear_avx512(const LinearProblem& problem) { run_linear_on<Avx512>(problem); }

}  // namespace pylora
