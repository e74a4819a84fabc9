// Converts fp16 and bf16, held as 16-bit patterns, to and from fp32 in plain C++. The portable
// kernels and the remainder loops of the vector kernels use it. Rounding is to nearest, ties to
// even.
#pragma once

#include <bit>
#include <cstdint>

#include "common/nf4.h"

namespace pylora {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

PYLORA_INLINE float to_float(float x) { return x; }

PYLORA_INLINE float to_float(BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

PYLORA_INLINE float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) {  // infinity or NaN
    return std::bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  }
  if (magnitude >= 0x400u) {  // normal: the exponent's bias changes from 15 to 127
    return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  }
  const float value = static_cast<float>(magnitude) * 0x1p-24f;  // subnormal or zero, exact
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
}

template <class T>
PYLORA_INLINE T from_float(float x);

template <>
PYLORA_INLINE float from_float<float>(float x) {
  return x;
}

template <>
PYLORA_INLINE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FC0u};  // rounding could make NaN infinite
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}

template <>
PYLORA_INLINE Half from_float<Half>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};   // NaN
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // >= 65520
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves units of 2^-24 in the low bits
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3F000000u))};
  }
  const uint32_t rebiased = magnitude - (112u << 23);
  return {static_cast<uint16_t>(sign | (rebiased + 0xFFFu + (rebiased >> 13 & 1u)) >> 13)};
}

// Calls visit(T{}) with the element type of `dtype`.
template <class Visit>
PYLORA_INLINE void visit_dtype(DType dtype, const Visit& visit) {
  if (dtype == DType::kFloat32) {
    visit(float{});
  } else if (dtype == DType::kFloat16) {
    visit(Half{});
  } else {
    visit(BFloat16{});
  }
}

}  // namespace pylora
