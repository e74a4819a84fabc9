#include "cpu/bottleneck_adapter_impl.h"
#include "cpu/vec_avx512.h"

namespace pylora::cpu {

void adapter_forward_avx512(const BottleneckArgs& args) { adapter_forward_on<Avx512>(args); }

void adapter_backward_avx512(const BottleneckArgs& args, const BackwardBuffers& buffers) {
  adapter_backward_on<Avx512>(args, buffers);
}

}  // namespace pylora::cpu
