#include "cpu/dora_linear_impl.h"
#include "cpu/vec_avx2.h"

namespace pylora::cpu {

void dora_rescale_avx2(const RescaleArgs& args) { rescale_on<Avx2>(args); }

}  // namespace pylora::cpu
