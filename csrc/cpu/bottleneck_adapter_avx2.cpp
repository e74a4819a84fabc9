#include "cpu/bottleneck_adapter_impl.h"
#include "cpu/vec_avx2.h"

namespace pylora::cpu {

void adapter_forward_avx2(const BottleneckArgs& args) { adapter_forward_on<Avx2>(args); }

void adapter_backward_avx2(const BottleneckArgs& args, const BackwardBuffers& buffers) {
  adapter_backward_on<Avx2>(args, buffers);
}

}  // namespace pylora::cpu
