#pragma once

#include "common/float16.h"

using __half = pylora::Half;
inline __half __float2half_rn(float x) { return pylora::from_float<pylora::Half>(x); }
inline float __half2float(__half x) { return pylora::to_float(x); }
