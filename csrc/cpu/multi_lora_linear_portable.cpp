#include "cpu/multi_lora_linear_impl.h"
#include "cpu/vec_portable.h"

namespace pylora::cpu {

void add_low_rank_portable(const LowRankSum& sum) { add_low_rank_on<Portable>(sum); }

}  // namespace pylora::cpu
