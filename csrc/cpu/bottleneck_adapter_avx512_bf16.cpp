#include "cpu/bottleneck_adapter_impl.h"
#include "cpu/vec_avx512_bf16.h"

namespace pylora::cpu {

void adapter_forward_avx512_bf16(const BottleneckArgs& args) {
  adapter_forward_bf16<Avx512Bf16, Bf16Mac>(args);
}

void adapter_backward_avx512_bf16(const BottleneckArgs& args, const BackwardBuffers& buffers) {
  adapter_backward_bf16<Avx512Bf16, Bf16Mac>(args, buffers);
}

}  // namespace pylora::cpu
