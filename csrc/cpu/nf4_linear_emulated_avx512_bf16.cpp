#include "cpu/nf4_linear_amx_impl.h"

namespace pylora::cpu {

void run_linear_amx_emulated(const NF4LinearArgs& args) {
  run_linear_on_tiles<EmulatedTiles>(args);
}

}  // namespace pylora::cpu
