// A number that tells if memory has changed.
#pragma once

#include <cstdint>
#include <cstring>

namespace pylora {

// A fingerprint of `count` bytes. It adds up the words, and the sums so far (Fletcher's checksum), so
// that a change is missed only if its differences cancel each other both plainly and weighted by
// their places, or by a chance of 2^-64. It is no defence against somebody who looks for such a
// change. Both sums run in lanes that the compiler turns into vectors: a hash takes several times as
// long.
inline uint64_t fingerprint(const void* data, int64_t count) {
  constexpr int kLanes = 8;  // with their sums they fill the vector registers of plain x86-64
  constexpr int64_t kWord = sizeof(uint64_t);
  constexpr int64_t kStep = kLanes * kWord;
  constexpr uint64_t kMix = 0x9E3779B97F4A7C15u;  // odd, so that a product by it loses nothing
  uint64_t sums[kLanes] = {};
  uint64_t weighted[kLanes] = {};
  const auto add = [&](const char* bytes) {
    for (int i = 0; i < kLanes; ++i) {
      uint64_t word;
      std::memcpy(&word, bytes + i * kWord, kWord);
      sums[i] += word;
      weighted[i] += sums[i];
    }
  };
  const char* bytes = static_cast<const char*>(data);
  int64_t begin = 0;
  for (; begin + kStep <= count; begin += kStep) add(bytes + begin);
  if (begin < count) {
    char last[kStep] = {};
    std::memcpy(last, bytes + begin, static_cast<size_t>(count - begin));
    add(last);
  }
  uint64_t all = static_cast<uint64_t>(count);
  for (int i = 0; i < kLanes; ++i) {
    // The shift brings the high half, which the product alone would not, down to the low bits.
    all = (all ^ (all >> 32)) * kMix + sums[i];
    all = (all ^ (all >> 32)) * kMix + weighted[i];
  }
  return all;
}

}  // namespace pylora
