// Dropout masks from Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3",
// SC 2011). Forward and backward both draw the mask from the seed, so no mask is stored.
//
// Element i of the flat input takes word i % 4 of counter (i / 4, 0) under the key `seed`. The
// element is kept if that word is at least `threshold`.
#pragma once

#include <bit>
#include <cstdint>

#include "common/nf4.h"
#include "common/philox.h"

namespace pylora::cpu {

struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;
  float scale = 1.0f;  // 1 / (1 - p)
  bool enabled = false;
};

// Draws the 64 words of 16 counters, from `counter` on, in the order of the elements. The rounds are
// those of philox_round() in common/philox.h, for a vector of counters: each lane has 64 bits, of
// which the low 32 are the word.
template <class S>
PYLORA_INLINE void philox_words(uint64_t seed, uint64_t counter, uint32_t* words) {
  using W = typename S::Wide;
  constexpr int kCounters = 16;
  constexpr int kWidth = S::kLanes / 2;
  constexpr int kSets = 2;  // independent vectors, whose products overlap
  const W multipliers[2] = {W{} + 0xD2511F53u, W{} + 0xCD9E8D57u};
#pragma GCC unroll 1
  for (int first = 0; first < kCounters; first += kSets * kWidth) {
    W c0[kSets], c1[kSets], c2[kSets] = {}, c3[kSets] = {};
    for (int s = 0; s < kSets; ++s) {
      for (int i = 0; i < kWidth; ++i) {
        c0[s][i] = counter + static_cast<uint64_t>(first + s * kWidth + i);
      }
      c1[s] = c0[s] >> 32;
    }
    PhiloxKey key(seed);
#pragma GCC unroll 1
    for (int round = 0; round < kPhiloxRounds; ++round, key.advance()) {
#pragma GCC unroll 2
      for (int s = 0; s < kSets; ++s) {
        const W p0 = S::mul_low(c0[s], multipliers[0]), p1 = S::mul_low(c2[s], multipliers[1]);
        c0[s] = (p1 >> 32) ^ c1[s] ^ (W{} + key.first);
        c1[s] = p1;
        c2[s] = (p0 >> 32) ^ c3[s] ^ (W{} + key.second);
        c3[s] = p0;
      }
    }
    for (int s = 0; s < kSets; ++s) {
      // The words of a counter are put together as two halves of 64 bits, which the compiler stores
      // at once.
      const W low = W{} + 0xFFFFFFFFu;
      const W pairs[2] = {(c0[s] & low) | c1[s] << 32, (c2[s] & low) | c3[s] << 32};
      for (int i = 0; i < kWidth; ++i) {
        uint32_t* out = words + 4 * (first + s * kWidth + i);
        for (int half = 0; half < 2; ++half) {
          out[2 * half] = static_cast<uint32_t>(pairs[half][i]);
          out[2 * half + 1] = static_cast<uint32_t>(pairs[half][i] >> 32);
        }
      }
    }
  }
}

// Writes the factor, 0 or 1 / (1 - p), of each element first .. first + count of the flat input.
template <class S>
void dropout_factors(const Dropout& dropout, int64_t first, int64_t count, float* factors) {
  constexpr int64_t kWords = 64;
  const uint32_t scale = std::bit_cast<uint32_t>(dropout.scale);
  uint32_t words[kWords];
  const int64_t end = first + count;
  for (int64_t base = first & ~int64_t{3}; base < end; base += kWords) {
    philox_words<S>(dropout.seed, static_cast<uint64_t>(base / 4), words);
    const int64_t skip = base < first ? first - base : 0;
    const int64_t stop = end - base < kWords ? end - base : kWords;
    float* out = factors + (base - first);
    for (int64_t i = skip; i < stop; ++i) {
      const uint32_t kept = words[i] >= dropout.threshold ? ~0u : 0u;
      out[i] = std::bit_cast<float>(kept & scale);
    }
  }
}

// Drops elements first .. first + count of the flat input, which are in `values`, and scales the
// others.
template <class S>
void drop_values(const Dropout& dropout, int64_t first, int64_t count, float* values) {
  constexpr int64_t kDrawn = 512;
  float factors[kDrawn];
  for (int64_t i = 0; i < count; i += kDrawn) {
    const int64_t drawn = count - i < kDrawn ? count - i : kDrawn;
    dropout_factors<S>(dropout, first + i, drawn, factors);
    float* to = values + i;
    // The product with 0 would make a NaN of an infinity.
    for (int64_t j = 0; j < drawn; ++j) to[j] = factors[j] != 0.0f ? to[j] * factors[j] : 0.0f;
  }
}

}  // namespace pylora::cpu
