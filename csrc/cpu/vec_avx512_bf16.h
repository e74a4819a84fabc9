// The vector primitives of vec_avx512.h with AVX-512 BF16 and VBMI: bf16 activations are multiplied
// without widening.
#pragma once

#include <array>

#include "cpu/vec_avx512.h"

namespace pylora::cpu {

struct Avx512Bf16 : Avx512 {
  PYLORA_INLINE static F dot(F acc, F a, F b) {  // acc + a0 b0 + a1 b1, pairs of bf16 in each lane
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // Pairs (even[i], odd[i]) for i < n, and zeros behind them; odd[i] is 0 if `odd` is null.
  PYLORA_INLINE static F load_pairs(const BFloat16* even, const BFloat16* odd, int n) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), even));
    if (odd == nullptr) return _mm512_castsi512_ps(low);
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), odd));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  // Pairs of the values of two vectors, rounded to bf16.
  PYLORA_INLINE static F to_pairs(F even, F odd) {
    const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even)));
    const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd)));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  // A table of 32 bf16: code * absmax of one block, then of another. Each is rounded once to fp32
  // and once to bf16, as a dequantized weight is.
  PYLORA_INLINE static __m512i table(float absmax, float other) {
    const F code = _mm512_loadu_ps(kNF4Code);
    return reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(_mm512_mul_ps(code, set1(other)), _mm512_mul_ps(code, set1(absmax))));
  }
  // Looks up 32 weights as bf16. The low byte of each word of `spread` is the byte of its weight.
  // `shifts` is 4 if that weight is the high nibble, else 0. `bank` (0 or 16) picks the half of the
  // table.
  PYLORA_INLINE static __m512i decode_32(__m512i spread, __m512i shifts, __m512i bank,
                                         __m512i table) {
    const __m512i index = _mm512_ternarylogic_epi32(
        _mm512_srlv_epi16(spread, shifts), _mm512_set1_epi16(15), bank, 0xEA);  // a & b | c
    return _mm512_permutexvar_epi16(index, table);
  }

  // Decodes `groups` (at most 4) times 32 weights, in natural order. scale(g) is the absmax of
  // group g.
  template <bool kFull, class Scale>
  PYLORA_INLINE static void decode_row_128(const uint8_t* q, const Scale& scale, int groups,
                                           float* out) {
    alignas(64) static constexpr auto kSpread = [] {
      std::array<uint8_t, 64> spread{};
      for (int i = 0; i < 64; ++i) spread[i] = static_cast<uint8_t>(i / 4);
      return spread;
    }();
    if (kFull) groups = 4;  // tells the compiler
    const __m512i bytes = kFull ? _mm512_loadu_si512(q)
                                : _mm512_maskz_loadu_epi8((__mmask64{1} << (16 * groups)) - 1, q);
    const __m512i spread = _mm512_load_si512(kSpread.data());
    const __m512i shifts = _mm512_set1_epi32(4);
#pragma GCC unroll 2
    for (int g = 0; g < groups; g += 2) {
      const __m512i codes = table(scale(g), scale(g + 1 < groups ? g + 1 : g));
      const __m512i even = _mm512_permutexvar_epi8(
          _mm512_add_epi8(spread, _mm512_set1_epi8(static_cast<char>(16 * g))), bytes);
      _mm512_storeu_si512(out + 16 * g, decode_32(even, shifts, _mm512_setzero_si512(), codes));
      if (g + 1 == groups) break;
      const __m512i odd = _mm512_permutexvar_epi8(
          _mm512_add_epi8(spread, _mm512_set1_epi8(static_cast<char>(16 * g + 16))), bytes);
      _mm512_storeu_si512(out + 16 * g + 16, decode_32(odd, shifts, _mm512_set1_epi16(16), codes));
    }
  }

  // Decodes 32 columns of two rows, from 16 bytes a row, into pairs (row, next row) of each column.
  PYLORA_INLINE static void decode_pair_32(const uint8_t* row, const uint8_t* next, float absmax,
                                           float next_absmax, float* out) {
    alignas(64) static constexpr auto kSpread =
        [] {  // word 2j: row, column j; word 2j + 1: next row
          std::array<uint8_t, 64> spread{};
          for (int i = 0; i < 64; ++i) {
            spread[i] = static_cast<uint8_t>(i / 8 + (i % 4 >= 2 ? 16 : 0));
          }
          return spread;
        }();
    const __m512i bytes = _mm512_castsi256_si512(_mm256_loadu2_m128i(
        reinterpret_cast<const __m128i*>(next), reinterpret_cast<const __m128i*>(row)));
    const __m512i spread = _mm512_load_si512(kSpread.data());
    const __m512i shifts = _mm512_set1_epi64(0x0000000000040004);
    const __m512i bank = _mm512_set1_epi32(16 << 16);
    const __m512i codes = table(absmax, next_absmax);
    const __m512i low = _mm512_permutexvar_epi8(spread, bytes);
    const __m512i high =
        _mm512_permutexvar_epi8(_mm512_add_epi8(spread, _mm512_set1_epi8(8)), bytes);
    _mm512_storeu_si512(out, decode_32(low, shifts, bank, codes));
    _mm512_storeu_si512(out + 16, decode_32(high, shifts, bank, codes));
  }

  // The small-M kernel multiplies the 16 codes by this before it rounds them to bf16, and the sum
  // by its inverse. That brings the root-mean-square rounding error of the codes down from 5.5e-4
  // to 3.2e-4; weights that are each rounded to bf16 have 8e-4.
  static constexpr float kCodeScale = 1.437f;
  PYLORA_INLINE static __m512i chunk_table(Bf16Mac<Avx512Bf16>) {
    return table(kCodeScale, kCodeScale);  // twice, so that an index's fifth bit does not matter
  }
  PYLORA_INLINE static constexpr float chunk_scale(Bf16Mac<Avx512Bf16>) {
    return 1.0f / kCodeScale;
  }
  PYLORA_INLINE static void decode_chunk(const uint8_t* q, int64_t left, __m512i table, F (&w)[4]) {
    const __m512i words = load_chunk(q, left);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      w[j] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * j), table));
    }
  }
};

}  // namespace pylora::cpu
