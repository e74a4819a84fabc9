#include "cpu/dense_linear_impl.h"
#include "cpu/vec_avx2.h"

namespace pylora::cpu {

void dense_linear_avx2(const DenseLinearArgs& args) { dense_linear_on<Avx2>(args); }

}  // namespace pylora::cpu
