#include "cpu/dora_linear_impl.h"
#include "cpu/vec_portable.h"

namespace pylora::cpu {

void dora_rescale_portable(const RescaleArgs& args) { rescale_on<Portable>(args); }

}  // namespace pylora::cpu
