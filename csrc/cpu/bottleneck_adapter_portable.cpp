#include "cpu/bottleneck_adapter_impl.h"
#include "cpu/vec_portable.h"

namespace pylora::cpu {

void adapter_forward_portable(const BottleneckArgs& args) { adapter_forward_on<Portable>(args); }

void adapter_backward_portable(const BottleneckArgs& args, const BackwardBuffers& buffers) {
  adapter_backward_on<Portable>(args, buffers);
}

}  // namespace pylora::cpu
