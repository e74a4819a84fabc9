#include "cpu/multi_lora_linear_impl.h"
#include "cpu/vec_avx512.h"

namespace pylora::cpu {

void add_low_rank_avx512(const LowRankSum& sum) { add_low_rank_on<Avx512>(sum); }

}  // namespace pylora::cpu
