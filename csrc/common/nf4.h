// NF4 in C++: the code table, the order of nibbles, blocks, and the dtypes of weights.
//
// Elements are counted over the flat [out_features, in_features] tensor. Element 2j is the HIGH
// nibble of byte j, and element 2j + 1 is the low one. Block b covers elements [b * blocksize,
// (b + 1) * blocksize), and may straddle rows.
//
// Everything here is inlined by force, since files compiled for different instruction sets include
// this header. If the compiler chose not to inline a function, the linker would keep one copy of
// it, perhaps the one for AVX-512, and a machine without AVX-512 would run that.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PYLORA_HOST_DEVICE __host__ __device__
#define PYLORA_INLINE PYLORA_HOST_DEVICE __forceinline__
#else
#define PYLORA_HOST_DEVICE
#define PYLORA_INLINE inline __attribute__((always_inline))
#endif

namespace pylora {

inline constexpr int kNF4Size = 16;

// The code of QLoRA (arXiv:2305.14314), in the exact fp32 values of bitsandbytes.
inline constexpr float kNF4Code[kNF4Size] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// The code of a scaled value is the number of midpoints below it, so a tie goes down.
PYLORA_INLINE constexpr float nf4_midpoint(int i) { return (kNF4Code[i] + kNF4Code[i + 1]) / 2.0f; }

// This code decodes to 0. It also fills the last nibble if the number of elements is odd.
inline constexpr int kNF4ZeroCode = 7;

// bitsandbytes clamps absmax to this before it divides, so that the reciprocal is finite.
inline constexpr float kNF4MinAbsmax = 1e-38f;

PYLORA_INLINE constexpr uint8_t nf4_pack(uint32_t even, uint32_t odd) {
  return static_cast<uint8_t>(even << 4 | odd);
}

PYLORA_INLINE constexpr uint32_t nf4_code_at(const uint8_t* qweight, int64_t element) {
  return (element % 2 == 0) ? qweight[element / 2] >> 4 : qweight[element / 2] & 0xFu;
}

PYLORA_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

PYLORA_INLINE constexpr bool is_nf4_blocksize(int64_t blocksize) {
  return blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0;
}

enum class DType { kFloat32, kFloat16, kBFloat16 };

PYLORA_INLINE constexpr int64_t dtype_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A quantized weight as a kernel receives it. Exactly one of absmax and absmax_q is set.
struct NF4Matrix {
  const uint8_t* qweight = nullptr;      // [ceil(rows * cols / 2)]
  const float* absmax = nullptr;         // [blocks]; null if absmax is nested
  const uint8_t* absmax_q = nullptr;     // [blocks], indices into nested_code; null if not nested
  const float* nested_absmax = nullptr;  // [ceil(blocks / nested_blocksize)]
  const float* nested_code = nullptr;    // [256]
  float offset = 0.0f;                   // added to a decoded nested absmax
  int64_t blocksize = 64;
  int64_t nested_blocksize = 256;
  int64_t rows = 0;  // N = out_features
  int64_t cols = 0;  // K = in_features

  PYLORA_INLINE int64_t numel() const { return rows * cols; }
  PYLORA_INLINE int64_t num_blocks() const { return ceil_div(rows * cols, blocksize); }
  PYLORA_INLINE bool nested() const { return absmax_q != nullptr; }

  // The result is rounded twice, as in bitsandbytes. Host files are compiled with
  // -ffp-contract=off, which keeps the product and the sum apart.
  PYLORA_INLINE float absmax_at(int64_t block) const {
    if (!nested()) return absmax[block];
    const float scale = nested_absmax[block / nested_blocksize];
#if defined(__CUDA_ARCH__)
    return __fadd_rn(__fmul_rn(nested_code[absmax_q[block]], scale), offset);
#else
    const float product = nested_code[absmax_q[block]] * scale;
    return product + offset;
#endif
  }
};

}  // namespace pylora
