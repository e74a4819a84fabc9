// The vector primitives in AVX2, FMA and F16C. Only files compiled with those flags include this.
#pragma once

#include <immintrin.h>

#include "common/float16.h"
#include "common/nf4.h"
#include "cpu/gemm_tile.h"

namespace pylora::cpu {

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kMaxV = 2;
  // How many rows a tile of `v` vectors has: 12 accumulators leave 4 of the 16 registers for the
  // operands.
  static constexpr int rows_for(int v) { return 12 / v; }
  using F = __m256;
  typedef uint64_t Wide __attribute__((vector_size(32)));

  PYLORA_INLINE static F zero() { return _mm256_setzero_ps(); }
  PYLORA_INLINE static F set1(float x) { return _mm256_set1_ps(x); }
  PYLORA_INLINE static F add(F a, F b) { return _mm256_add_ps(a, b); }
  PYLORA_INLINE static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  PYLORA_INLINE static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // The products of the low 32 bits of each lane.
  PYLORA_INLINE static Wide mul_low(Wide a, Wide b) {
    return reinterpret_cast<Wide>(
        _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
  }
  PYLORA_INLINE static float sum(F a) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }

  PYLORA_INLINE static F load(const float* p) { return _mm256_loadu_ps(p); }
  PYLORA_INLINE static F load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  PYLORA_INLINE static F load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  PYLORA_INLINE static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  PYLORA_INLINE static void store(BFloat16* p, F v) {  // rounds to nearest even; a NaN stays one
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high =
        _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7FC0), nan);
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
  }
  PYLORA_INLINE static void store(Half* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <class T>
  PYLORA_INLINE static F load_n(const T* p, int n) {  // lanes from n on are zero
    alignas(32) float values[kLanes] = {};
    for (int i = 0; i < n; ++i) values[i] = to_float(p[i]);
    return _mm256_load_ps(values);
  }
  template <class T>
  PYLORA_INLINE static void store_n(T* p, F v, int n) {
    alignas(32) float values[kLanes];
    _mm256_store_ps(values, v);
    for (int i = 0; i < n; ++i) p[i] = from_float<T>(values[i]);
  }

  PYLORA_INLINE static void transpose(F (&r)[8]) {
    F t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const F low = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      const F high = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
      r[i] = low;
      r[i + 4] = high;
    }
  }

  // The 16 codes lie in two registers, and bit 3 of an index chooses between them.
  struct Codes {
    F low, high;
  };
  PYLORA_INLINE static Codes codes() {
    return {_mm256_loadu_ps(kNF4Code), _mm256_loadu_ps(kNF4Code + 8)};
  }
  PYLORA_INLINE static F look_up(const Codes& codes, __m256i index) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(codes.low, index),
                            _mm256_permutevar8x32_ps(codes.high, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }

  // Decodes 8 consecutive weights of one block from 4 bytes.
  PYLORA_INLINE static F decode(const uint8_t* q, float absmax) {
    int32_t word;
    __builtin_memcpy(&word, q, sizeof word);
    const __m256i index =
        _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
    return _mm256_mul_ps(look_up(codes(), index), _mm256_set1_ps(absmax));
  }

  // Decodes a chunk (nf4_linear_small_m.h) of 64 weights; at most `left` of them are read.
  PYLORA_INLINE static Codes chunk_table(F32Mac<Avx2>) { return codes(); }
  PYLORA_INLINE static constexpr float chunk_scale(F32Mac<Avx2>) { return 1.0f; }
  PYLORA_INLINE static void decode_chunk(const uint8_t* q, int64_t left, const Codes& codes,
                                         F (&w)[8]) {
    const auto* bytes = reinterpret_cast<const __m128i*>(q);
    const __m256i words = left >= 64 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q))
                                     : _mm256_zextsi128_si256(_mm_loadu_si128(bytes));
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) w[j] = look_up(codes, _mm256_srli_epi32(words, 4 * j));
  }
  PYLORA_INLINE static F spread(const float (&absmax)[1]) { return set1(absmax[0]); }
  PYLORA_INLINE static F spread(const float (&absmax)[2]) {
    return _mm256_set_m128(_mm_set1_ps(absmax[1]), _mm_set1_ps(absmax[0]));
  }
};

}  // namespace pylora::cpu
