#include "cpu/nf4_linear_amx_impl.h"

namespace pylora::cpu {

void run_linear_amx_emulated(const LinearProblem& p) { Amx<EmulatedTiles>::run_linear(p); }

}  // namespace pylora::cpu
