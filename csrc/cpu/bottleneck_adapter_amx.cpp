#include "cpu/bottleneck_adapter_amx_impl.h"

namespace pylora::cpu {

void adapter_forward_amx(const BottleneckArgs& args) { AmxAdapter<HardwareTiles>::forward(args); }

void adapter_backward_amx(const BottleneckArgs& args, float* low, float* dh) {
  AmxAdapter<HardwareTiles>::backward(args, low, dh);
}

}  // namespace pylora::cpu
