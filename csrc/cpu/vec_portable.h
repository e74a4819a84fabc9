// The vector primitives in plain C++: four lanes, in the vector extension of GCC and Clang.
//
// Every kernel is a template over one of these structs (Portable, Avx2, Avx512, ...). A file that
// is compiled for one instruction set therefore never shares an instantiation with another one.
#pragma once

#include <cstring>

#include "common/float16.h"
#include "common/nf4.h"
#include "cpu/gemm_tile.h"

namespace pylora::cpu {

struct Portable {
  static constexpr int kLanes = 4;
  static constexpr int kMaxV = 2;  // vectors in a tile's row: 6 x 2 accumulators in 16 registers
  static constexpr int rows_for(int) { return 6; }
  typedef float F __attribute__((vector_size(16)));
  typedef uint64_t Wide __attribute__((vector_size(16)));

  PYLORA_INLINE static F zero() { return F{0.0f, 0.0f, 0.0f, 0.0f}; }
  PYLORA_INLINE static F set1(float x) { return F{x, x, x, x}; }
  PYLORA_INLINE static F add(F a, F b) { return a + b; }
  PYLORA_INLINE static F mul(F a, F b) { return a * b; }
  PYLORA_INLINE static F fma(F a, F b, F c) { return a * b + c; }
  // The products of the low 32 bits of each lane.
  PYLORA_INLINE static Wide mul_low(Wide a, Wide b) {
    return Wide{uint64_t{static_cast<uint32_t>(a[0])} * static_cast<uint32_t>(b[0]),
                uint64_t{static_cast<uint32_t>(a[1])} * static_cast<uint32_t>(b[1])};
  }
  PYLORA_INLINE static float sum(F a) { return (a[0] + a[1]) + (a[2] + a[3]); }

  PYLORA_INLINE static F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  PYLORA_INLINE static void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }

  template <class T>
  PYLORA_INLINE static F load(const T* p) {
    return F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }
  template <class T>
  PYLORA_INLINE static void store(T* p, F v) {
    for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(v[i]);
  }
  template <class T>
  PYLORA_INLINE static F load_n(const T* p, int n) {  // lanes from n on are zero
    F v = zero();
    for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
    return v;
  }
  template <class T>
  PYLORA_INLINE static void store_n(T* p, F v, int n) {
    for (int i = 0; i < n; ++i) p[i] = from_float<T>(v[i]);
  }
  PYLORA_INLINE static void transpose(F (&r)[kLanes]) {
    F t[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < kLanes; ++j) t[i][j] = r[j][i];
    }
    for (int i = 0; i < kLanes; ++i) r[i] = t[i];
  }
  // Decodes kLanes consecutive weights of one block, from element `e` (even) on.
  PYLORA_INLINE static F decode(const uint8_t* q, float absmax) {
    return F{kNF4Code[q[0] >> 4], kNF4Code[q[0] & 15], kNF4Code[q[1] >> 4], kNF4Code[q[1] & 15]} *
           set1(absmax);
  }

  // Decodes a chunk (nf4_linear_small_m.h) of 32 weights; at most `left` of them are read.
  PYLORA_INLINE static const float* chunk_table(F32Mac<Portable>) { return kNF4Code; }
  PYLORA_INLINE static constexpr float chunk_scale(F32Mac<Portable>) { return 1.0f; }
  PYLORA_INLINE static void decode_chunk(const uint8_t* q, int64_t /*left*/, const float* table,
                                         F (&w)[8]) {
    for (int j = 0; j < 8; j += 2) {
      for (int i = 0; i < kLanes; ++i) {
        const uint32_t byte = q[4 * i + j / 2];
        w[j][i] = table[byte & 15];
        w[j + 1][i] = table[byte >> 4];
      }
    }
  }
  PYLORA_INLINE static F spread(const float (&absmax)[1]) { return set1(absmax[0]); }
};

}  // namespace pylora::cpu
