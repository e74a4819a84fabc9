#pragma once

#include "common/float16.h"

using __nv_bfloat16 = pylora::BFloat16;
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return pylora::from_float<pylora::BFloat16>(x);
}
inline float __bfloat162float(__nv_bfloat16 x) { return pylora::to_float(x); }
