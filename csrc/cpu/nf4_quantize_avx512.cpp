// AVX-512 F, BW, VL and DQ quantize 16 elements at a time. A code is found by a binary search
// through the 15 midpoints. Each step is one vpermps from a register: four steps replace 15
// compares, and the result is exact.
#include <immintrin.h>

#include "common/float16.h"
#include "cpu/nf4_quantize.h"

namespace pylora::cpu {
namespace {

PYLORA_INLINE __m512 load16(const float* x) { return _mm512_loadu_ps(x); }

PYLORA_INLINE __m512 load16(const Half* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

PYLORA_INLINE __m512 load16(const BFloat16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// The codes of 16 scaled values, one in each 32-bit lane. After d steps lane `index` holds the top
// d bits of the code; the midpoint that decides the next bit is number (2 * index + 1) * 2^(3 - d)
// - 1.
PYLORA_INLINE __m512i nearest_codes(__m512 scaled) {
  constexpr auto m = nf4_midpoint;
  const __m512 second = _mm512_setr_ps(m(3), m(11), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512 third = _mm512_setr_ps(m(1), m(5), m(9), m(13), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512 fourth =
      _mm512_setr_ps(m(0), m(2), m(4), m(6), m(8), m(10), m(12), m(14), 0, 0, 0, 0, 0, 0, 0, 0);
  const __m512i one = _mm512_set1_epi32(1);
  const auto next_bit = [&](__m512i index, __m512 midpoint) {
    const __mmask16 above = _mm512_cmp_ps_mask(scaled, midpoint, _CMP_GT_OQ);
    const __m512i twice = _mm512_add_epi32(index, index);
    return _mm512_mask_add_epi32(twice, above, twice, one);
  };
  __m512i index = next_bit(_mm512_setzero_si512(), _mm512_set1_ps(m(7)));
  index = next_bit(index, _mm512_permutexvar_ps(index, second));
  index = next_bit(index, _mm512_permutexvar_ps(index, third));
  return next_bit(index, _mm512_permutexvar_ps(index, fourth));
}

// Packs 16 codes, which lie in 32-bit lanes, into 8 bytes. In a 64-bit lane the even code is the
// lower half, the odd code the upper one.
PYLORA_INLINE __m128i pack16(__m512i codes) {
  const __m512i bytes = _mm512_or_si512(_mm512_slli_epi64(codes, 4), _mm512_srli_epi64(codes, 32));
  return _mm512_cvtepi64_epi8(bytes);
}

template <class T>
PYLORA_INLINE void quantize_blocks(const T* weight, int64_t begin, int64_t end, int64_t blocksize,
                                   uint8_t* qweight, float* absmax) {
  for (int64_t block = begin; block < end; ++block) {
    const T* x = weight + block * blocksize;
    uint8_t* packed = qweight + block * blocksize / 2;
    __m512 even = _mm512_setzero_ps();
    __m512 odd = _mm512_setzero_ps();
    for (int64_t i = 0; i < blocksize; i += 32) {
      even = _mm512_max_ps(even, _mm512_abs_ps(load16(x + i)));
      odd = _mm512_max_ps(odd, _mm512_abs_ps(load16(x + i + 16)));
    }
    const float largest = _mm512_reduce_max_ps(_mm512_max_ps(even, odd));
    absmax[block] = largest;
    const __m512 inverse =
        _mm512_set1_ps(1.0f / (largest > kNF4MinAbsmax ? largest : kNF4MinAbsmax));
    for (int64_t i = 0; i < blocksize; i += 32) {
      const __m512i low = nearest_codes(_mm512_mul_ps(load16(x + i), inverse));
      const __m512i high = nearest_codes(_mm512_mul_ps(load16(x + i + 16), inverse));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2),
                       _mm_unpacklo_epi64(pack16(low), pack16(high)));
    }
  }
}

}  // namespace

void nf4_quantize_blocks_avx512(const void* weight, DType dtype, int64_t begin, int64_t end,
                                int64_t blocksize, uint8_t* qweight, float* absmax) {
  visit_dtype(dtype, [&](auto element) {
    quantize_blocks(static_cast<const decltype(element)*>(weight), begin, end, blocksize, qweight,
                    absmax);
  });
}

}  // namespace pylora::cpu
