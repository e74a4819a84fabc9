#include "cpu/bottleneck_adapter_amx_impl.h"

namespace pylora::cpu {

void adapter_forward_amx_emulated(const BottleneckArgs& args) {
  AmxAdapter<EmulatedTiles>::forward(args);
}

void adapter_backward_amx_emulated(const BottleneckArgs& args, float* low, float* dh) {
  AmxAdapter<EmulatedTiles>::backward(args, low, dh);
}

}  // namespace pylora::cpu
