// Dropout masks from Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3",
// SC 2011). Forward and backward both draw the mask from the seed, so no mask is stored.
//
// Element i of the flat input takes word i % 4 of counter (i / 4, 0) under the key `seed`. The
// element is kept if that word is at least `threshold`.
#pragma once

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

// Draws the 64 words of 16 counters, from `counter` on, in the order of the elements.
template <class S>
PYLORA_INLINE void philox_words(uint64_t seed, uint64_t counter, uint32_t* words) {
  constexpr int kCounters = 16;
  uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
  for (int i = 0; i < kCounters; ++i) {
    const uint64_t c = counter + static_cast<uint64_t>(i);
    c0[i] = static_cast<uint32_t>(c);
    c1[i] = static_cast<uint32_t>(c >> 32);
    c2[i] = 0;
    c3[i] = 0;
  }
  PhiloxKey key(seed);
  for (int round = 0; round < kPhiloxRounds; ++round, key.advance()) {
    for (int i = 0; i < kCounters; ++i) philox_round(key, c0[i], c1[i], c2[i], c3[i]);
  }
  for (int i = 0; i < kCounters; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

// Writes the factor, 0 or 1 / (1 - p), of each element first .. first + count of the flat input.
template <class S>
void dropout_factors(const Dropout& dropout, int64_t first, int64_t count, float* factors) {
  constexpr int64_t kWords = 64;
  uint32_t words[kWords];
  const int64_t end = first + count;
  for (int64_t base = first & ~int64_t{3}; base < end; base += kWords) {
    philox_words<S>(dropout.seed, static_cast<uint64_t>(base / 4), words);
    const int64_t skip = base < first ? first - base : 0;
    const int64_t stop = end - base < kWords ? end - base : kWords;
    float* out = factors + (base - first);
    for (int64_t i = skip; i < stop; ++i) {
      out[i] = words[i] >= dropout.threshold ? dropout.scale : 0.0f;
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
