#include "cpu/dropout_impl.h"
#include "cpu/vec_avx2.h"

namespace pylora::cpu {

void drop_elements_avx2(const DropoutArgs& args) { drop_elements_on<Avx2>(args); }

}  // namespace pylora::cpu
