#include "cpu/amx_tile.h"
#include "cpu/lora_linear_bf16_impl.h"

namespace pylora::cpu {

void project_amx(const TokenMatrix& x, const AdapterFactor& factor, const float* bias, float* out) {
  project_bf16<AmxVectors, Amx<HardwareTiles>::Mac>(x, factor, bias, out);
}

void gather_amx(const TokenMatrix& x, const float* low, const AdapterFactor& gradient,
                float* sums) {
  gather_bf16<AmxVectors, Amx<HardwareTiles>::Mac>(x, low, gradient, sums);
}

}  // namespace pylora::cpu
