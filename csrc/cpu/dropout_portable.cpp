#include "cpu/dropout_impl.h"
#include "cpu/vec_portable.h"

namespace pylora::cpu {

void drop_elements_portable(const DropoutArgs& args) { drop_elements_on<Portable>(args); }

}  // namespace pylora::cpu
