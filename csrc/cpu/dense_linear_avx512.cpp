#include "cpu/dense_linear_impl.h"
#include "cpu/vec_avx512.h"

namespace pylora::cpu {

void dense_linear_avx512(const DenseLinearArgs& args) { dense_linear_on<Avx512>(args); }

}  // namespace pylora::cpu
