// nf4_linear.h for bf16 on AMX tiles: the panels of nf4_linear_impl.h, multiplied tile by tile.
#pragma once

#include "cpu/amx_tile.h"
#include "cpu/nf4_linear_impl.h"

namespace pylora::cpu {

// Up to so many tokens a tile would be mostly padding, and decoding into it would cost more than
// the products: AVX-512 takes the call, in fp32, because the processors that have AMX are slower
// with vectors of bf16. On Sapphire Rapids, one thread, 4096 x 4096: fp32 vectors take 0.97 ms for
// 1 token and 1.53 ms for 4, bf16 vectors 1.16 and 2.25 ms, tiles 1.72 and 1.67 ms.
inline constexpr int64_t kMaxAmxSmallM = 4;

template <class Tiles>
void run_linear_on_tiles(const NF4LinearArgs& args) {
  if (args.tokens == 0 || args.width() == 0) return;
  if (args.backward) {
    return run_panels<AmxVectors, Amx<Tiles>::template Mac, BFloat16, true>(args);
  }
  if (args.tokens <= kMaxAmxSmallM) return run_linear_avx512(args);
  run_panels<AmxVectors, Amx<Tiles>::template Mac, BFloat16, false>(args);
}

}  // namespace pylora::cpu
