#include "cpu/nf4_linear_amx_impl.h"

namespace pylora::cpu {

void run_linear_amx(const NF4LinearArgs& args) { run_linear_on_tiles<HardwareTiles>(args); }

}  // namespace pylora::cpu
