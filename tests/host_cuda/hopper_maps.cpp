// Checks that each map of hopper/lora_linear.cu covers everything that it maps, and each once. The
// exit code is 0 if all maps do.
#include <cstdio>
#include <set>
#include <vector>

#include "cuda/hopper/maps.cuh"
#include "cuda/hopper/ptx.cuh"

namespace {

using namespace pylora::cuda;

bool all_right = true;

void expect(bool right, const char* what) {
  if (!right) std::fprintf(stderr, "wrong: %s\n", what);
  all_right &= right;
}

// Counts numbers. It is complete if it got each number from 0 to count - 1 exactly once.
class Cover {
 public:
  explicit Cover(int count) : seen_(static_cast<size_t>(count)) {}
  void add(int number) {
    if (number < 0 || number >= static_cast<int>(seen_.size())) {
      outside_ = true;
    } else {
      ++seen_[static_cast<size_t>(number)];
    }
  }
  bool complete() const {
    for (const int times : seen_) {
      if (times != 1) return false;
    }
    return !outside_;
  }

 private:
  std::vector<int> seen_;
  bool outside_ = false;
};

void check_fragments() {
  Cover bytes(kGroupRows * kPackedRowBytes), ranks(kGroupRows * kLowColumns);
  for (int thread = 0; thread < kGroupThreads; ++thread) {
    for (int step = 0; step < kSteps; ++step) {
      for (int i = 0; i < 4; ++i) {
        const int row = fragment_row(thread, i);
        const int byte = 4 * fragment_word(step, i) + fragment_byte(thread);
        bytes.add(row * kPackedRowBytes + byte);
        ranks.add(row * kLowColumns + fragment_rank(thread, step, i));
        // By the PTX ISA, lane k % 8 / 2 of a quad holds element k of a step of 16, in register
        // k / 8 * 2.
        const int k = 2 * byte % 16;
        expect(k % 8 / 2 == thread % 4 && k / 8 == i / 2 && 2 * byte / 16 == step, "fragments");
      }
    }
  }
  expect(bytes.complete(), "bytes of fragments");
  expect(ranks.complete(), "columns of lora_B's fragments");
}

void check_packed_tile() {
  Cover units(kPackedBytes / kVectorBytes);
  alignas(256) static uint8_t tile[kPackedBytes];
  for (int row = 0; row < kTileRows; ++row) {
    for (int unit = 0; unit < 2; ++unit) {
      units.add(packed_offset(row, unit) / kVectorBytes);
      uint8_t* plain = tile + row * kPackedRowBytes + unit * kVectorBytes;
      expect(swizzled(plain, Swizzle::k32) == tile + packed_offset(row, unit), "swizzle by 32");
    }
  }
  expect(units.complete(), "units of the packed tile");
  std::set<int> banks;
  for (int row = 0; row < 8; ++row) banks.insert(packed_offset(row, 0) / kVectorBytes % 8);
  expect(banks.size() == 8, "banks of the packed tile");
}

template <int kTokens>
void check_accumulators() {
  Cover sums(kGroupRows * kTokens);
  for (int thread = 0; thread < kGroupThreads; ++thread) {
    for (int i = 0; i < kTokens / 2; ++i) {
      sums.add(fragment_row(thread, i / 2) * kTokens + accumulator_token(thread, i));
    }
  }
  expect(sums.complete(), "accumulators");
}

void check_staging() {
  Cover places(kPairEntries * 8), written(kStagedTokens * 8);
  for (int consumer = 0; consumer < kConsumers; ++consumer) {
    for (int token = 0; token < kStagedTokens; ++token) {
      for (int unit = 0; unit < 8; ++unit) {
        places.add(staging_hole(consumer, token) * 8 + staging_unit(token, unit));
      }
    }
  }
  expect(places.complete(), "places of outputs");
  for (int warp = 0; warp < 4; ++warp) {
    for (int pair = 0; pair < kStagedTokens / 16; ++pair) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        std::set<int> banks;
        for (int row = 0; row < 8; ++row) {
          const int lane = 8 * matrix + row;
          const int token = staged_token(pair, lane), unit = staged_unit(warp, lane);
          written.add(token * 8 + unit);
          banks.insert(staging_unit(token, unit));
          // Register `matrix` of the warp must hold the matrix that is stored there.
          const int sum = 4 * staged_octet(pair, matrix) + matrix % 2 * 2;
          expect(accumulator_token(0, sum) / 8 == token / 8, "tokens of a stored matrix");
          expect(fragment_row(32 * warp, sum / 2) / 8 == unit, "rows of a stored matrix");
        }
        expect(banks.size() == 8, "banks of a stored matrix");
      }
    }
  }
  expect(written.complete(), "stored matrices");
}

template <int kTokens>
void check_partials() {
  constexpr int kSlices = 2, kTiles = 3, kUnits = kTokens / 8;
  Cover units(kSlices * kTiles * kConsumers * kUnits * kGroupThreads);
  for (int group = 0; group < kSlices * kTiles * kConsumers; ++group) {
    const int split = group / kConsumers / kTiles, tile = group / kConsumers % kTiles;
    for (int i = 0; i < kUnits * kGroupThreads; ++i) {
      units.add(static_cast<int>(partial_vector<kTokens>(split, kTiles, tile, group % kConsumers,
                                                         i / kGroupThreads, i % kGroupThreads)));
    }
  }
  expect(units.complete(), "sums of splits");
}

void check_ring() {
  for (const int stages : {HopperStages<128>::kCount, HopperStages<256>::kCount}) {
    RingPlace place;
    for (int use = 0; use < 5 * stages; ++use, place.advance(stages)) {
      expect(place.stage == use % stages && place.parity == use / stages % 2, "ring");
    }
  }
}

}  // namespace

int main() {
  check_fragments();
  check_packed_tile();
  check_accumulators<128>();
  check_accumulators<256>();
  check_partials<128>();
  check_partials<256>();
  check_staging();
  check_ring();
  return all_right ? 0 : 1;
}
