// nf4_linear.h for bf16 on AMX tiles: the panels of nf4_linear_impl.h, multiplied tile by tile.
#pragma once

#include "cpu/amx_tile.h"
#include "cpu/nf4_linear_impl.h"

namespace pylora::cpu {

// Up to so many tokens a tile would be mostly padding, and decoding into it would cost more than
// the products: AVX-512 takes the call. The number is an estimate: these kernels have not been
// timed on a processor with AMX.
inline constexpr int64_t kMaxAmxSmallM = 4;

template <class Tiles>
struct Amx {
  template <class S>
  using Mac = AmxMac<S, Tiles>;

  static void run_linear(const NF4LinearArgs& args) {
    if (args.tokens == 0 || args.width() == 0) return;
    if (args.backward) return run_panels<Avx512Bf16, Mac, BFloat16, true>(args);
    if (args.tokens <= kMaxAmxSmallM && run_small_m<Avx512Bf16, Bf16Mac, BFloat16>(args)) return;
    run_panels<Avx512Bf16, Mac, BFloat16, false>(args);
  }
};

}  // namespace pylora::cpu
