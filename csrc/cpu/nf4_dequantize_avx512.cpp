// NF4 dequantization with AVX-512 F, BW, VL and DQ. A block's 16 values fill a register (fp32) or
// half of one (16 bits). One vpermps or vpermw then decodes 16 or 32 weights.
#include <immintrin.h>

#include "common/float16.h"
#include "cpu/nf4_dequantize.h"

namespace pylora::cpu {
namespace {

PYLORA_INLINE __m512 values_of_block(float absmax) {
  return _mm512_mul_ps(_mm512_loadu_ps(kNF4Code), _mm512_set1_ps(absmax));
}

// Repeats the 16 words, so that an index may carry one foreign bit above the nibble.
PYLORA_INLINE __m512i twice(__m256i words) { return _mm512_broadcast_i64x4(words); }

PYLORA_INLINE __m512i table(Half, float absmax) {
  constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return twice(_mm512_cvtps_ph(values_of_block(absmax), kNearestEven));
}

// This rounds with integers: vcvtneps2bf16 would flush denormals, and some AVX-512 machines lack
// it.
PYLORA_INLINE __m512i table(BFloat16, float absmax) {
  const __m512 values = values_of_block(absmax);
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(last, _mm512_set1_epi32(0x7FFF));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  return twice(
      _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0))));
}

PYLORA_INLINE __m512i table(float, float absmax) {
  return _mm512_castps_si512(values_of_block(absmax));
}

// Decodes 32 weights from 16 bytes.
template <class T>
PYLORA_INLINE void decode32(T* out, const uint8_t* packed, __m512i table) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m512i spread = _mm512_cvtepu8_epi32(bytes);
  // Word 2j of the index is the high nibble of byte j, and word 2j + 1 is the byte itself. The
  // permute uses five bits of it: the low nibble, and one bit that the doubled table makes
  // harmless.
  const __m512i index =
      _mm512_or_si512(_mm512_srli_epi32(spread, 4), _mm512_slli_epi32(spread, 16));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
}

PYLORA_INLINE void decode32(float* out, const uint8_t* packed, __m512i table) {
  for (int half = 0; half < 2; ++half) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + 8 * half));
    const __m512i spread = _mm512_cvtepu8_epi64(bytes);
    // This is the same with 32-bit lanes, of which the permute uses four bits.
    const __m512i index =
        _mm512_or_si512(_mm512_srli_epi64(spread, 4), _mm512_slli_epi64(spread, 32));
    _mm512_storeu_si512(out + 16 * half, _mm512_permutexvar_epi32(index, table));
  }
}

template <class T>
PYLORA_INLINE void dequantize_blocks(const NF4Matrix& weight, int64_t begin, int64_t end, T* out) {
  const int64_t blocksize = weight.blocksize;
  for (int64_t block = begin; block < end; ++block) {
    const __m512i values = table(T{}, weight.absmax_at(block));
    const uint8_t* packed = weight.qweight + block * blocksize / 2;
    for (int64_t i = 0; i < blocksize; i += 32) {
      decode32(out + i, packed + i / 2, values);
    }
    out += blocksize;
  }
}

}  // namespace

void nf4_dequantize_blocks_avx512(const NF4Matrix& weight, DType out_dtype, int64_t begin,
                                  int64_t end, void* out) {
  visit_dtype(out_dtype, [&](auto element) {
    dequantize_blocks(weight, begin, end, static_cast<decltype(element)*>(out));
  });
}

}  // namespace pylora::cpu
