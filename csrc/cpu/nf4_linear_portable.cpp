#include "cpu/nf4_linear_impl.h"
#include "cpu/vec_portable.h"

namespace pylora::cpu {

void run_linear_portable(const NF4LinearArgs& args) {
  visit_dtype(args.dtype,
              [&](auto element) { run_linear_as<Portable, F32Mac, decltype(element)>(args); });
}

}  // namespace pylora::cpu
