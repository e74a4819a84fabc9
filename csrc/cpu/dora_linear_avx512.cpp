#include "cpu/dora_linear_impl.h"
#include "cpu/vec_avx512.h"

namespace pylora::cpu {

void dora_rescale_avx512(const RescaleArgs& args) { rescale_on<Avx512>(args); }

}  // namespace pylora::cpu
