// NF4 dequantization with AVX2 and F16C. If the output has 16 bits, a block's 16 values are held as
// two planes that pshufb can index: the low and the high bytes. If it is fp32, they fill two
// registers, and the nibble's top bit selects one of these.
#include <immintrin.h>

#include "common/float16.h"
#include "cpu/nf4_dequantize.h"

namespace pylora::cpu {
namespace {

struct Values {
  __m256 low, high;  // entries 0-7, 8-15
};

PYLORA_INLINE Values values_of_block(float absmax) {
  const __m256 scale = _mm256_set1_ps(absmax);
  return {_mm256_mul_ps(_mm256_loadu_ps(kNF4Code), scale),
          _mm256_mul_ps(_mm256_loadu_ps(kNF4Code + 8), scale)};
}

PYLORA_INLINE __m128i round8(Half, __m256 values) {
  return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

PYLORA_INLINE __m128i round8(BFloat16, __m256 values) {
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(last, _mm256_set1_epi32(0x7FFF));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

// The two tables of a block, in the form that decode32 wants for its type.
struct Table {
  __m256i low, high;
};

template <class T>
PYLORA_INLINE Table table(T, float absmax) {
  const Values values = values_of_block(absmax);
  const __m128i first = round8(T{}, values.low);
  const __m128i second = round8(T{}, values.high);
  const __m128i byte = _mm_set1_epi16(0xFF);
  const __m128i low = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
  const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
  return {_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)};
}

PYLORA_INLINE Table table(float, float absmax) {
  const Values values = values_of_block(absmax);
  return {_mm256_castps_si256(values.low), _mm256_castps_si256(values.high)};
}

// The nibbles of 16 bytes in the order of the elements: 0-15 in the low half, 16-31 in the high
// one.
PYLORA_INLINE __m256i nibbles32(const uint8_t* packed) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m128i mask = _mm_set1_epi8(0xF);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  const __m128i odd = _mm_and_si128(bytes, mask);
  return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}

// Decodes 32 weights from 16 bytes.
template <class T>
PYLORA_INLINE void decode32(T* out, const uint8_t* packed, const Table& table) {
  const __m256i index = nibbles32(packed);
  const __m256i low = _mm256_shuffle_epi8(table.low, index);
  const __m256i high = _mm256_shuffle_epi8(table.high, index);
  const __m256i outer = _mm256_unpacklo_epi8(low, high);  // words 0-7 and 16-23
  const __m256i inner = _mm256_unpackhi_epi8(low, high);  // words 8-15 and 24-31
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm256_permute2x128_si256(outer, inner, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16),
                      _mm256_permute2x128_si256(outer, inner, 0x31));
}

PYLORA_INLINE void decode32(float* out, const uint8_t* packed, const Table& table) {
  for (int quarter = 0; quarter < 4; ++quarter) {
    uint32_t four = 0;
    std::memcpy(&four, packed + 4 * quarter, sizeof(four));
    const __m128i bytes = _mm_cvtsi32_si128(static_cast<int>(four));
    const __m128i pairs = _mm_unpacklo_epi8(_mm_srli_epi16(bytes, 4), bytes);
    // The permute looks at three bits of an index, the blend at its topmost: bit 3, moved there.
    const __m256i index = _mm256_cvtepu8_epi32(pairs);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    const __m256 below = _mm256_permutevar8x32_ps(_mm256_castsi256_ps(table.low), index);
    const __m256 above = _mm256_permutevar8x32_ps(_mm256_castsi256_ps(table.high), index);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8 * quarter),
                        _mm256_castps_si256(_mm256_blendv_ps(below, above, upper)));
  }
}

template <class T>
PYLORA_INLINE void dequantize_blocks(const NF4Matrix& weight, int64_t begin, int64_t end, T* out) {
  const int64_t blocksize = weight.blocksize;
  for (int64_t block = begin; block < end; ++block) {
    const Table values = table(T{}, weight.absmax_at(block));
    const uint8_t* packed = weight.qweight + block * blocksize / 2;
    for (int64_t i = 0; i < blocksize; i += 32) {
      decode32(out + i, packed + i / 2, values);
    }
    out += blocksize;
  }
}

}  // namespace

void nf4_dequantize_blocks_avx2(const NF4Matrix& weight, DType out_dtype, int64_t begin,
                                int64_t end, void* out) {
  visit_dtype(out_dtype, [&](auto element) {
    dequantize_blocks(weight, begin, end, static_cast<decltype(element)*>(out));
  });
}

}  // namespace pylora::cpu
