#include "cpu/multi_lora_linear_impl.h"
#include "cpu/vec_avx2.h"

namespace pylora::cpu {

void add_low_rank_avx2(const LowRankSum& sum) { add_low_rank_on<Avx2>(sum); }

}  // namespace pylora::cpu
