#include "cpu/dense_linear_impl.h"
#include "cpu/vec_portable.h"

namespace pylora::cpu {

void dense_linear_portable(const DenseLinearArgs& args) { dense_linear_on<Portable>(args); }

}  // namespace pylora::cpu
