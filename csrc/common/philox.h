// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), one
// counter at a time, as in pylora/reference/dropout.py. The CPU kernels draw 16 counters at a time
// (cpu/philox.h).
#pragma once

#include <cstdint>

#include "common/nf4.h"

namespace pylora {

// The two words of a key.
struct PhiloxKey {
  uint32_t first, second;

  PYLORA_INLINE explicit PhiloxKey(uint64_t seed)
      : first(static_cast<uint32_t>(seed)), second(static_cast<uint32_t>(seed >> 32)) {}
  PYLORA_INLINE void advance() {
    first += 0x9E3779B9u;
    second += 0xBB67AE85u;
  }
};

inline constexpr int kPhiloxRounds = 10;

PYLORA_INLINE void philox_round(const PhiloxKey& key, uint32_t& c0, uint32_t& c1, uint32_t& c2,
                                uint32_t& c3) {
  const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
  const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
  c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key.first;
  c1 = static_cast<uint32_t>(p1);
  c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key.second;
  c3 = static_cast<uint32_t>(p0);
}

// Draws the words of elements 4 * counter to 4 * counter + 3, with key `seed` and counter (counter,
// 0).
PYLORA_INLINE void philox4(uint64_t seed, uint64_t counter, uint32_t (&words)[4]) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  PhiloxKey key(seed);
  for (int round = 0; round < kPhiloxRounds; ++round, key.advance()) {
    philox_round(key, c0, c1, c2, c3);
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

}  // namespace pylora
