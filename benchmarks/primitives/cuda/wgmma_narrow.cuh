// PTX wrappers for wgmma with 16, 32 and 64 columns. Those for 128 and 256 columns are in
// hopper/ptx.cuh. These are not, because no kernel uses such tiles yet.
#pragma once

#include "cuda/hopper/ptx.cuh"

#if PYLORA_SM90A

namespace primitives {

#define PRIMITIVES_D_8(i)                                                                     \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define PRIMITIVES_A_B "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor)
#define PRIMITIVES_WGMMA(columns, sums, a, b)                                             \
  "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.bf16.bf16 {" sums "}, {" a "}, " b \
  ", 1, 1, 1, 0;"

// Called by a whole warpgroup. Starts d += A B in bf16, with the layouts of multiply() in
// hopper/ptx.cuh.
template <int kTokens>
__device__ __forceinline__ void multiply_bf16(float (&d)[kTokens / 2], const uint32_t (&a)[4],
                                              SharedOperand b) {
  if constexpr (kTokens == 16) {
    asm volatile(PRIMITIVES_WGMMA("16", "%0, %1, %2, %3, %4, %5, %6, %7", "%8, %9, %10, %11", "%12")
                 : PRIMITIVES_D_8(0)
                 : PRIMITIVES_A_B);
  } else if constexpr (kTokens == 32) {
    asm volatile(PRIMITIVES_WGMMA("32",
                                  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
                                  "%14, %15",
                                  "%16, %17, %18, %19", "%20")
                 : PRIMITIVES_D_8(0), PRIMITIVES_D_8(8)
                 : PRIMITIVES_A_B);
  } else if constexpr (kTokens == 64) {
    asm volatile(PRIMITIVES_WGMMA("64",
                                  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
                                  "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "
                                  "%26, %27, %28, %29, %30, %31",
                                  "%32, %33, %34, %35", "%36")
                 : PRIMITIVES_D_8(0), PRIMITIVES_D_8(8), PRIMITIVES_D_8(16), PRIMITIVES_D_8(24)
                 : PRIMITIVES_A_B);
  } else {
    multiply<__nv_bfloat16, kTokens>(d, a, b, 1);
  }
}

#undef PRIMITIVES_D_8
#undef PRIMITIVES_A_B
#undef PRIMITIVES_WGMMA

}  // namespace primitives

#endif
