#include "cpu/dropout_impl.h"
#include "cpu/vec_avx512.h"

namespace pylora::cpu {

void drop_elements_avx512(const DropoutArgs& args) { drop_elements_on<Avx512>(args); }

}  // namespace pylora::cpu
