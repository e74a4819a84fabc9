#include "cpu/nf4_linear_impl.h"
#include "cpu/vec_portable.h"

namespace pylora {

void run_linear_portable(const LinearProblem& problem) { run_linear_on<Portable>(problem); }

}  // namespace pylora
