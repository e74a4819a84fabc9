#include "cpu/nf4_linear_impl.h"
#include "cpu/vec_avx512.h"

namespace pylora::cpu {

void run_linear_avx512(const NF4LinearArgs& args) {
  visit_dtype(args.dtype,
              [&](auto element) { run_linear_as<Avx512, F32Mac, decltype(element)>(args); });
}

}  // namespace pylora::cpu
