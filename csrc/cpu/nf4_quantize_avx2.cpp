// AVX2 and F16C quantize 8 elements at a time. A code is found by a binary search through the 15
// midpoints, as in nf4_quantize_avx512.cpp. Each step looks its midpoint up in a register, which
// holds at most eight.
#include <immintrin.h>

#include "common/float16.h"
#include "cpu/nf4_quantize.h"

namespace pylora::cpu {
namespace {

PYLORA_INLINE __m256 load8(const float* x) { return _mm256_loadu_ps(x); }

PYLORA_INLINE __m256 load8(const Half* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

PYLORA_INLINE __m256 load8(const BFloat16* x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// The codes of 8 scaled values, one in each 32-bit lane.
PYLORA_INLINE __m256i nearest_codes(__m256 scaled) {
  constexpr auto m = nf4_midpoint;
  const __m256 second = _mm256_setr_ps(m(3), m(11), 0, 0, 0, 0, 0, 0);
  const __m256 third = _mm256_setr_ps(m(1), m(5), m(9), m(13), 0, 0, 0, 0);
  const __m256 fourth = _mm256_setr_ps(m(0), m(2), m(4), m(6), m(8), m(10), m(12), m(14));
  const auto next_bit = [&](__m256i index, __m256 midpoint) {
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(scaled, midpoint, _CMP_GT_OQ));
    return _mm256_sub_epi32(_mm256_add_epi32(index, index), above);  // a true lane is -1
  };
  __m256i index = next_bit(_mm256_setzero_si256(), _mm256_set1_ps(m(7)));
  index = next_bit(index, _mm256_permutevar8x32_ps(second, index));
  index = next_bit(index, _mm256_permutevar8x32_ps(third, index));
  return next_bit(index, _mm256_permutevar8x32_ps(fourth, index));
}

// Packs 32 codes, which lie in 32-bit lanes, into 16 bytes.
PYLORA_INLINE __m128i pack32(__m256i a, __m256i b, __m256i c, __m256i d) {
  // The packs work within 128-bit halves. They leave groups of four codes in the order
  // a.low b.low c.low d.low | a.high b.high c.high d.high; the permute joins the halves of each.
  const __m256i words_ab = _mm256_packus_epi32(a, b);
  const __m256i words_cd = _mm256_packus_epi32(c, d);
  const __m256i mixed = _mm256_packus_epi16(words_ab, words_cd);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i codes = _mm256_permutevar8x32_epi32(mixed, order);
  // Each pair of bytes becomes even * 16 + odd.
  const __m256i bytes = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));
  return _mm_packus_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
}

PYLORA_INLINE float reduce_max(__m256 x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

template <class T>
PYLORA_INLINE void quantize_blocks(const T* weight, int64_t begin, int64_t end, int64_t blocksize,
                                   uint8_t* qweight, float* absmax) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  for (int64_t block = begin; block < end; ++block) {
    const T* x = weight + block * blocksize;
    uint8_t* packed = qweight + block * blocksize / 2;
    __m256 even = _mm256_setzero_ps();
    __m256 odd = _mm256_setzero_ps();
    for (int64_t i = 0; i < blocksize; i += 16) {
      even = _mm256_max_ps(even, _mm256_and_ps(load8(x + i), magnitude));
      odd = _mm256_max_ps(odd, _mm256_and_ps(load8(x + i + 8), magnitude));
    }
    const float largest = reduce_max(_mm256_max_ps(even, odd));
    absmax[block] = largest;
    const __m256 inverse =
        _mm256_set1_ps(1.0f / (largest > kNF4MinAbsmax ? largest : kNF4MinAbsmax));
    const auto codes = [&](int64_t i) {
      return nearest_codes(_mm256_mul_ps(load8(x + i), inverse));
    };
    for (int64_t i = 0; i < blocksize; i += 32) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2),
                       pack32(codes(i), codes(i + 8), codes(i + 16), codes(i + 24)));
    }
  }
}

}  // namespace

void nf4_quantize_blocks_avx2(const void* weight, DType dtype, int64_t begin, int64_t end,
                              int64_t blocksize, uint8_t* qweight, float* absmax) {
  visit_dtype(dtype, [&](auto element) {
    quantize_blocks(static_cast<const decltype(element)*>(weight), begin, end, blocksize, qweight,
                    absmax);
  });
}

}  // namespace pylora::cpu
