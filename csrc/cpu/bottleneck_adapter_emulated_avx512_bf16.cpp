#include "cpu/bottleneck_adapter_amx_impl.h"

namespace pylora::cpu {

void adapter_forward_amx_emulated(const BottleneckArgs& args) {
  adapter_forward_bf16<AmxVectors, Amx<EmulatedTiles>::Mac>(args);
}

void adapter_backward_amx_emulated(const BottleneckArgs& args, const BackwardBuffers& buffers) {
  adapter_backward_bf16<AmxVectors, Amx<EmulatedTiles>::Mac>(args, buffers);
}

}  // namespace pylora::cpu
