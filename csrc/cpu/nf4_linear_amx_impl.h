// nf4_linear.h for bf16 on AMX tiles: the same panels, multiplied tile by tile.
#pragma once

#include "cpu/amx_tile.h"
#include "cpu/nf4_linear_impl.h"

namespace pylora::cpu {

// For fewer tokens a tile is mostly padding, and decoding into it costs more than the products.
// Estimate: the kernels have not been timed on a processor with AMX.
inline constexpr int64_t kAmxVectorTokens = 4;

template <class Tiles>
struct Amx {
  template <class S>
  using Mac = AmxMac<S, Tiles>;

  static void run_linear(const LinearProblem& p) {
    if (p.rows == 0 || p.width() == 0) return;
    if (p.backward) return run_panels<Avx512Bf16, Mac, BFloat16, true>(p);
    if (p.rows <= kAmxVectorTokens && run_vector<Avx512Bf16, Bf16Mac, BFloat16>(p)) return;
    run_panels<Avx512Bf16, Mac, BFloat16, false>(p);
  }
};

}  // namespace pylora::cpu
