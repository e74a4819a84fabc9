#include "cpu/nf4_linear_amx_impl.h"

namespace pylora::cpu {

void run_linear_amx(const LinearProblem& problem) { Amx<HardwareTiles>::run_linear(problem); }

}  // namespace pylora::cpu
