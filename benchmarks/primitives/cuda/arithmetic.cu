// Measures the instructions that decode NF4 and scale it: PRMT, LOP3, shifts, packed products, FFMA
// and conversions. Each warp has eight independent chains, so that latency does not count.
#include <cstring>

#include "timed_loop.cuh"

namespace primitives {
namespace {

// Chain i of a thread computes x = Op(x, y) again and again.
template <class Op>
struct Chains : PlainBody {
  __device__ Chains(uint8_t*, const Input& input, int thread) : y(input.constants[Op::kConstant]) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) x[i] = Op::first(scramble(thread * kSlots + i));
  }
  __device__ __forceinline__ void slot(int i) { Op::issue(x[i], y); }
  __device__ uint32_t result() {
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) sum += x[i];
    return sum;
  }
  static uint32_t expected(int thread, uint32_t rounds) {
    uint32_t sum = 0;
    for (int i = 0; i < kSlots; ++i) {
      const uint32_t first = Op::first(scramble(thread * kSlots + i));
      sum += Op::after(first, kConstants[Op::kConstant], rounds);
    }
    return sum;
  }

  uint32_t x[kSlots], y;
};

// An op on 32 random bits. `once` computes it on the host.
template <class Op>
struct BitOp {
  static constexpr int kConstant = 0;
  static __host__ __device__ uint32_t first(uint32_t random) { return random; }
  static uint32_t after(uint32_t x, uint32_t y, uint32_t rounds) {
    while (rounds-- > 0) x = Op::once(x, y);
    return x;
  }
};

struct Prmt : BitOp<Prmt> {
  static __device__ __forceinline__ void issue(uint32_t& x, uint32_t y) {
    asm volatile("prmt.b32 %0, %0, %1, 0x5103;" : "+r"(x) : "r"(y));
  }
  // The result has bytes 3, 0 and 1 of x, then byte 1 of y.
  static uint32_t once(uint32_t x, uint32_t y) {
    return x >> 24 | (x & 0xFFFF) << 8 | (y >> 8 & 0xFF) << 24;
  }
};

struct Lop3 : BitOp<Lop3> {
  static __device__ __forceinline__ void issue(uint32_t& x, uint32_t y) {
    asm volatile("lop3.b32 %0, %0, %1, 0x0F0F0F0F, 0x78;" : "+r"(x) : "r"(y));
  }
  static uint32_t once(uint32_t x, uint32_t y) { return x ^ (y & 0x0F0F0F0Fu); }
};

// A funnel shift is used, since the compiler could merge plain shifts of several turns.
struct Shift : BitOp<Shift> {
  static __device__ __forceinline__ void issue(uint32_t& x, uint32_t y) {
    asm volatile("shf.r.wrap.b32 %0, %0, %1, 4;" : "+r"(x) : "r"(y));
  }
  static uint32_t once(uint32_t x, uint32_t y) { return x >> 4 | y << 28; }
};

struct Imad : BitOp<Imad> {
  static __device__ __forceinline__ void issue(uint32_t& x, uint32_t y) {
    asm volatile("mad.lo.u32 %0, %0, %1, %1;" : "+r"(x) : "r"(y));
  }
  static uint32_t once(uint32_t x, uint32_t y) { return x * y + y; }
};

// The bits of a result are the next integer to convert.
struct I2F : BitOp<I2F> {
  static __device__ __forceinline__ void issue(uint32_t& x, uint32_t) {
    asm volatile("{\n.reg .f32 value;\ncvt.rn.f32.s32 value, %0;\nmov.b32 %0, value;\n}" : "+r"(x));
  }
  static uint32_t once(uint32_t x, uint32_t) {
    const float value = static_cast<float>(static_cast<int32_t>(x));
    std::memcpy(&x, &value, sizeof(x));
    return x;
  }
};

// Computes x = x * 1 + 1, starting from 2 to 3.75. The ones come from memory. Sums are exact up to
// 2^22.
struct Ffma {
  static constexpr int kConstant = 3;
  static __host__ __device__ uint32_t first(uint32_t random) {
    return 0x40000000u + (random & 0x700000u);
  }
  static __device__ __forceinline__ void issue(uint32_t& x, uint32_t y) {
    asm volatile(
        "{\n.reg .f32 a, b;\nmov.b32 a, %0;\nmov.b32 b, %1;\nfma.rn.f32 a, a, b, b;\n"
        "mov.b32 %0, a;\n}"
        : "+r"(x)
        : "r"(y));
  }
  static uint32_t after(uint32_t x, uint32_t, uint32_t rounds) {
    float value;
    std::memcpy(&value, &x, sizeof(x));
    value += static_cast<float>(rounds);
    std::memcpy(&x, &value, sizeof(x));
    return x;
  }
};

// Computes x = x * 1 + 1 for a pair of 16-bit numbers with kBits of mantissa, starting from 2. Both
// numbers stop at 2^(kBits + 1): the next sum is half-way between two numbers, of which the lower
// one is even.
template <int kBits, int kConstantIndex>
struct PackedFma {
  static constexpr int kConstant = kConstantIndex;
  static __host__ __device__ uint32_t first(uint32_t) { return 0x40004000u; }
  static __device__ __forceinline__ void issue(uint32_t& x, uint32_t y) {
    if constexpr (kBits == 10) {
      asm volatile("fma.rn.f16x2 %0, %0, %1, %1;" : "+r"(x) : "r"(y));
    } else {
      asm volatile("fma.rn.bf16x2 %0, %0, %1, %1;" : "+r"(x) : "r"(y));
    }
  }
  static uint32_t after(uint32_t, uint32_t y, uint32_t rounds) {
    const uint32_t value = std::min(2 + rounds, 2u << kBits);
    uint32_t exponent = 0;
    while (value >> (exponent + 1)) ++exponent;
    const uint32_t mantissa = (value << kBits >> exponent) - (1u << kBits);
    const uint32_t code = (y & 0xFFFF) + (exponent << kBits) + mantissa;  // y is two ones
    return code << 16 | code;
  }
};
using Hfma2 = PackedFma<10, 1>;
using Hfma2Bf16 = PackedFma<7, 2>;

constexpr int kTurns = 256;

std::vector<Experiment> experiments() {
  std::vector<Experiment> all;
  const std::string one = "a slot is one instruction";
  const std::string two = "a slot is one of each";
  add_loop<Chains<Prmt>>(all, "prmt", kTurns, 0, one);
  add_loop<Chains<Lop3>>(all, "lop3", kTurns, 0.5, one);
  add_loop<Chains<Shift>>(all, "shift", kTurns, 0.5, one + ", a funnel shift by a constant");
  add_loop<Chains<Imad>>(all, "imad", kTurns, 0.5, one);
  add_loop<Chains<Hfma2>>(all, "hfma2", kTurns, 0, one);
  add_loop<Chains<Hfma2Bf16>>(all, "hfma2_bf16", kTurns, 0, one);
  add_loop<Chains<Ffma>>(all, "ffma", kTurns, 0.25, one);
  add_loop<Chains<I2F>>(all, "i2f", kTurns, 0, one + ", int32 to fp32");
  add_loop<Mix<Chains<Prmt>, Chains<Hfma2>>>(all, "prmt+hfma2", kTurns, 0, two);
  add_loop<Mix<Chains<Prmt>, Chains<Hfma2Bf16>>>(all, "prmt+hfma2_bf16", kTurns, 0, two);
  add_loop<Mix<Chains<Prmt>, Chains<Lop3>>>(all, "prmt+lop3", kTurns, 1.0, two);
  return all;
}

}  // namespace
}  // namespace primitives

int main(int count, char** arguments) {
  return primitives::run_program(primitives::experiments(), count, arguments);
}
