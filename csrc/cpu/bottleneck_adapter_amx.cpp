#include "cpu/bottleneck_adapter_amx_impl.h"

namespace pylora::cpu {

void adapter_forward_amx(const BottleneckArgs& args) {
  adapter_forward_bf16<AmxVectors, Amx<HardwareTiles>::Mac>(args);
}

void adapter_backward_amx(const BottleneckArgs& args, const BackwardBuffers& buffers) {
  adapter_backward_bf16<AmxVectors, Amx<HardwareTiles>::Mac>(args, buffers);
}

}  // namespace pylora::cpu
