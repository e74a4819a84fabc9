// Counts the wavefronts of a warp's accesses to shared memory from the addresses of its lanes.
//
// Shared memory has 32 banks of 4 bytes, and a wavefront brings one word of each bank. Lanes that
// want the same word share it. If each lane accesses 8 bytes, the halves of the warp take at least
// one wavefront each; if each lane accesses 16 bytes, the quarters do.
//
// Lanes are separate fibers here, so the accesses of a warp must be put together again. The lanes'
// k-th accesses at one place in the source, since the whole warp last met in an operation, count as
// one access. A GPU does the same unless the lanes diverged in between: if a lane skips an access
// that the others make in a loop, its later accesses are counted with the earlier ones of the
// others, up to the next meeting. A GPU may serve several quarters in one wavefront if they want
// the same words; that is not counted either.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "report.h"

namespace host_cuda {

inline constexpr unsigned kBanks = 32;
inline constexpr unsigned kBankBytes = 4;

// Returns the wavefronts of lanes that are served together.
inline unsigned wavefronts(const std::vector<uintptr_t>& addresses, unsigned bytes) {
  std::vector<uintptr_t> words;
  for (const uintptr_t address : addresses) {
    for (uintptr_t word = address / kBankBytes; word * kBankBytes < address + bytes; ++word) {
      words.push_back(word);
    }
  }
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  std::array<unsigned, kBanks> of_bank = {};
  for (const uintptr_t word : words) ++of_bank[word % kBanks];
  return *std::max_element(of_bank.begin(), of_bank.end());
}

// The accesses of a warp since its lanes last met.
class WarpAccesses {
 public:
  void add(size_t site, unsigned lane, const void* pointer) {
    if (sites_.size() <= site) sites_.resize(site + 1);
    sites_[site][lane].push_back(reinterpret_cast<uintptr_t>(pointer));
    empty_ = false;
  }

  void count() {
    if (empty_) return;
    for (size_t site = 0; site < sites_.size(); ++site) {
      size_t times = 0;
      for (const auto& lane : sites_[site]) times = std::max(times, lane.size());
      for (size_t time = 0; time < times; ++time) count_access(report.sites[site], site, time);
      for (auto& lane : sites_[site]) lane.clear();
    }
    empty_ = true;
  }

 private:
  static constexpr unsigned kWarpLanes = 32;

  void count_access(AccessSite& of, size_t site, size_t time) const {
    const unsigned together = kWarpLanes / std::max(1u, of.bytes / kBankBytes);
    ++of.accesses;
    for (unsigned first = 0; first < kWarpLanes; first += together) {
      std::vector<uintptr_t> addresses;
      for (unsigned lane = first; lane < first + together; ++lane) {
        const std::vector<uintptr_t>& mine = sites_[site][lane];
        if (time < mine.size()) addresses.push_back(mine[time]);
      }
      if (addresses.empty()) continue;
      of.wavefronts += wavefronts(addresses, of.bytes);
      ++of.least;
    }
  }

  std::vector<std::array<std::vector<uintptr_t>, kWarpLanes>> sites_;
  bool empty_ = true;
};

}  // namespace host_cuda
