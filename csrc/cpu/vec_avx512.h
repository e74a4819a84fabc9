// The vector primitives in AVX-512 F, BW, VL and DQ. Only files compiled with those flags include
// this.
#pragma once

#include <immintrin.h>

#include "common/float16.h"
#include "common/nf4.h"
#include "cpu/gemm_tile.h"

namespace pylora::cpu {

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kMaxV = 4;
  // How many rows a tile of `v` vectors has: 24 accumulators hide the latency of two FMA pipes.
  static constexpr int rows_for(int v) { return 24 / v; }
  using F = __m512;
  typedef uint64_t Wide __attribute__((vector_size(64)));

  PYLORA_INLINE static F zero() { return _mm512_setzero_ps(); }
  PYLORA_INLINE static F set1(float x) { return _mm512_set1_ps(x); }
  PYLORA_INLINE static F add(F a, F b) { return _mm512_add_ps(a, b); }
  PYLORA_INLINE static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  PYLORA_INLINE static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // The products of the low 32 bits of each lane.
  PYLORA_INLINE static Wide mul_low(Wide a, Wide b) {
    return reinterpret_cast<Wide>(
        _mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
  }
  PYLORA_INLINE static float sum(F a) {
    constexpr __mmask16 kAll = 0xFFFF;  // the mask spares GCC 12 a warning about its own header
    a = add(a, _mm512_maskz_shuffle_f32x4(kAll, a, a, 0x4E));
    a = add(a, _mm512_maskz_shuffle_f32x4(kAll, a, a, 0xB1));
    a = add(a, _mm512_maskz_shuffle_ps(kAll, a, a, 0x4E));
    a = add(a, _mm512_maskz_shuffle_ps(kAll, a, a, 0xB1));
    return _mm512_cvtss_f32(a);
  }

  PYLORA_INLINE static F widen(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
  }
  // Rounds fp32 to bf16, to nearest even. A NaN stays one.
  PYLORA_INLINE static __m256i narrow(F v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i high = _mm512_srli_epi32(up, 16);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(high, nan, _mm512_set1_epi32(0x7FC0)));
  }
  PYLORA_INLINE static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  PYLORA_INLINE static __m256i half_bits(F v) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  PYLORA_INLINE static F load(const float* p) { return _mm512_loadu_ps(p); }
  PYLORA_INLINE static F load(const BFloat16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  PYLORA_INLINE static F load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  PYLORA_INLINE static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  PYLORA_INLINE static void store(BFloat16* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v));
  }
  PYLORA_INLINE static void store(Half* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half_bits(v));
  }
  PYLORA_INLINE static F load_n(const float* p, int n) {
    return _mm512_maskz_loadu_ps(first(n), p);
  }
  PYLORA_INLINE static F load_n(const BFloat16* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p));
  }
  PYLORA_INLINE static F load_n(const Half* p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
  }
  PYLORA_INLINE static void store_n(float* p, F v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
  PYLORA_INLINE static void store_n(BFloat16* p, F v, int n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow(v));
  }
  PYLORA_INLINE static void store_n(Half* p, F v, int n) {
    _mm256_mask_storeu_epi16(p, first(n), half_bits(v));
  }

  PYLORA_INLINE static void transpose(F (&r)[16]) {
    F t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    const auto lo = [](F a, F b) __attribute__((always_inline)) {
      return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    const auto hi = [](F a, F b) __attribute__((always_inline)) {
      return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      r[i] = lo(t[i], t[i + 2]);
      r[i + 1] = hi(t[i], t[i + 2]);
      r[i + 2] = lo(t[i + 1], t[i + 3]);
      r[i + 3] = hi(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // a 4 x 4 transpose of 128-bit lanes
      const F a = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      const F b = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xDD);
      const F c = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
      const F d = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xDD);
      t[i] = _mm512_shuffle_f32x4(a, c, 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
      t[i + 8] = _mm512_shuffle_f32x4(a, c, 0xDD);
      t[i + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }

  // Decodes 16 consecutive weights of one block from 8 bytes.
  PYLORA_INLINE static F decode(const uint8_t* q, float absmax) {
    const __m256i bytes =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q)));
    // A 64-bit lane holds one byte. Its low half takes the high nibble, and its high half takes the
    // byte itself, since vpermps reads only the low four bits of an index.
    const __m512i wide = _mm512_cvtepu32_epi64(bytes);
    const __m512i index = _mm512_or_si512(_mm512_srli_epi64(wide, 4), _mm512_slli_epi64(wide, 32));
    return _mm512_mul_ps(_mm512_permutexvar_ps(index, _mm512_loadu_ps(kNF4Code)),
                         _mm512_set1_ps(absmax));
  }

  // Decodes a chunk (nf4_linear_small_m.h) of 128 weights; at most `left` of them are read.
  PYLORA_INLINE static __m512i load_chunk(const uint8_t* q, int64_t left) {
    if (left >= 128) return _mm512_loadu_si512(q);
    return _mm512_maskz_loadu_epi8((__mmask64{1} << (left / 2)) - 1, q);
  }
  template <class S>
  PYLORA_INLINE static F chunk_table(F32Mac<S>) {
    return _mm512_loadu_ps(kNF4Code);
  }
  template <class S>
  PYLORA_INLINE static constexpr float chunk_scale(F32Mac<S>) {
    return 1.0f;
  }
  PYLORA_INLINE static void decode_chunk(const uint8_t* q, int64_t left, F table, F (&w)[8]) {
    const __m512i words = load_chunk(q, left);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      w[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * j), table);
    }
  }
  PYLORA_INLINE static F spread(const float (&absmax)[1]) { return set1(absmax[0]); }
  PYLORA_INLINE static F spread(const float (&absmax)[2]) {
    return _mm512_mask_mov_ps(set1(absmax[0]), 0xFF00, set1(absmax[1]));
  }
  PYLORA_INLINE static F spread(const float (&absmax)[4]) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                 _mm512_castps128_ps512(_mm_loadu_ps(absmax)));
  }
};

}  // namespace pylora::cpu
