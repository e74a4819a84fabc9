// Measures look-ups in shared memory, shuffles and asynchronous copies, which share one pipe: each
// alone, and mixed with each other and with mma.sync.
#include "bodies.cuh"

namespace primitives {
namespace {

// All lanes look up the same 256 words at fixed random places. It shows what bank conflicts cost.
struct SharedTable : PrivateTable {
  static constexpr int kSharedBytes = 1024;
  static __host__ __device__ uint32_t offset(int thread, int slot) {
    return scramble(thread * kSlots + slot) % 256 * 4;
  }
  static __device__ void prepare(uint8_t* shared, int thread, int threads) {
    fill_words(shared, kSharedBytes, thread, threads);
  }
  __device__ SharedTable(uint8_t* shared, const Input& input, int thread)
      : PrivateTable(shared, input, thread) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) address[i] = shared_address(shared) + offset(thread, i);
  }
  static uint32_t expected(int thread, uint32_t rounds) {
    uint32_t sum = 0;
    for (int i = 0; i < kSlots; ++i) sum += scramble(offset(thread, i) / 4);
    return rounds * sum;
  }
};

// LDS.128, with which a warp reads kDistinct neighbouring units of 16 bytes. With kGrouped,
// neighbouring lanes read the same unit; otherwise every kDistinct-th lane does.
template <int kDistinct, bool kGrouped>
struct Vectors : PlainBody {
  static constexpr int kSharedBytes = kSlots * 512;
  static __host__ __device__ int first_word(int thread, int slot) {
    const int lane = thread % 32;
    return slot * 128 + 4 * (kGrouped ? lane / (32 / kDistinct) : lane % kDistinct);
  }
  static __device__ void prepare(uint8_t* shared, int thread, int threads) {
    fill_words(shared, kSharedBytes, thread, threads);
  }
  __device__ Vectors(uint8_t* shared, const Input&, int thread)
      : address(shared_address(shared) + 4 * first_word(thread, 0)) {}
  __device__ __forceinline__ void slot(int i) {
    uint4 v;
    asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address + i * 512));
    sum += v.x + v.w;
  }
  __device__ uint32_t result() { return sum; }
  static uint32_t expected(int thread, uint32_t rounds) {
    uint32_t sum = 0;
    for (int i = 0; i < kSlots; ++i) {
      sum += scramble(first_word(thread, i)) + scramble(first_word(thread, i) + 3);
    }
    return rounds * sum;
  }

  uint32_t address, sum = 0;
};

// LDSM.x4 of 512 consecutive bytes, which has no bank conflicts. The compiler would leave out a
// second LDSM of the same address. Each round moves the address by a zero that it does not know.
struct Matrices : PlainBody {
  static constexpr int kSharedBytes = kSlots * 512;
  static __device__ void prepare(uint8_t* shared, int thread, int threads) {
    fill_words(shared, kSharedBytes, thread, threads);
  }
  __device__ Matrices(uint8_t* shared, const Input& input, int thread)
      : row(shared + thread % 32 * 16), zero(input.constants[kZero]) {}
  __device__ __forceinline__ void slot(int i) {
    uint32_t out[4];
    load_matrices(out, row + i * 512);
    sum += out[0] + out[3];
  }
  __device__ __forceinline__ void end_round() { row += zero; }
  __device__ uint32_t result() { return sum; }
  // Register j of lane l holds word l % 4 of row l / 4 of matrix j, which has 8 rows of 4 words.
  static uint32_t expected(int thread, uint32_t rounds) {
    uint32_t sum = 0;
    for (int i = 0; i < kSlots; ++i) {
      sum += scramble(i * 128 + thread % 32) + scramble(i * 128 + 96 + thread % 32);
    }
    return rounds * sum;
  }

  const uint8_t* row;
  uint32_t zero, sum = 0;
};

// SHFL: slot i moves its value by i + 1 lanes.
struct Shuffles : PlainBody {
  static __host__ __device__ uint32_t first(int warp, int lane, int slot) {
    return scramble((warp * 32 + lane) * kSlots + slot);
  }
  __device__ Shuffles(uint8_t*, const Input&, int thread) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      value[i] = first(thread / 32, thread % 32, i);
      from[i] = (thread + i + 1) % 32;
    }
  }
  __device__ __forceinline__ void slot(int i) {
    asm volatile("shfl.sync.idx.b32 %0, %0, %1, 0x1F, 0xFFFFFFFF;" : "+r"(value[i]) : "r"(from[i]));
  }
  __device__ uint32_t result() {
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) sum += value[i];
    return sum;
  }
  static uint32_t expected(int thread, uint32_t rounds) {
    uint32_t sum = 0;
    for (uint32_t i = 0; i < kSlots; ++i) {
      const uint32_t lane = (static_cast<uint32_t>(thread) + rounds * (i + 1)) % 32;
      sum += first(thread / 32, static_cast<int>(lane), static_cast<int>(i));
    }
    return sum;
  }

  uint32_t value[kSlots], from[kSlots];
};

// cp.async of 16 bytes for each lane from L2, in the first kUsed slots. A round is a group of
// copies, and three groups are under way.
template <int kUsed>
struct Copies : PlainBody {
  static constexpr int kSharedBytes = kUsed * kMaxThreads * 16;
  static constexpr int kAreaBytes = 4 * kGlobalPeriod;  // what a CTA copies from
  static constexpr int kAreas = kGlobalWords / kGlobalPeriod;
  static_assert(kSharedBytes <= kAreaBytes);

  __device__ Copies(uint8_t* shared, const Input& input, int thread)
      : place(shared + thread * 16),
        source(input.global + blockIdx.x % kAreas * kAreaBytes + thread * 16) {}
  __device__ __forceinline__ void slot(int i) {
    constexpr int kStep = kMaxThreads * 16;
    if (i < kUsed) copy_async_16(place + i * kStep, source + i * kStep);
  }
  __device__ __forceinline__ void end_round() {
    copy_async_commit();
    copy_async_wait<2>();
  }
  __device__ __forceinline__ void end_loop() { copy_async_wait<0>(); }
  __device__ uint32_t result() {
    uint32_t sum = 0;
    for (int i = 0; i < kUsed; ++i) {
      const auto* words = reinterpret_cast<const uint32_t*>(place + i * kMaxThreads * 16);
      for (int j = 0; j < 4; ++j) sum += words[j];
    }
    return sum;
  }
  static uint32_t expected(int thread, uint32_t) {
    uint32_t sum = 0;
    for (int i = 0; i < kUsed; ++i) {
      for (int j = 0; j < 4; ++j) sum += global_word((i * kMaxThreads + thread) * 4 + j);
    }
    return sum;
  }

  uint8_t* place;
  const uint8_t* source;
};

// The number is odd, so that shuffled values do not end where they began.
constexpr int kTurns = 255;

std::vector<Experiment> experiments() {
  std::vector<Experiment> all;
  add_loop<PrivateTable>(all, "lds32_private", kTurns, 1,
                         "a slot is one LDS.32, each lane in its own bank, random rows");
  add_loop<DecodeTable>(all, "lds32_private+prmt", kTurns, 1,
                        "a slot is one PRMT and one LDS.32: the decode of nf4/nf4_decode.cuh");
  add_loop<SharedTable>(all, "lds32_shared_table", kTurns, 0,
                        "a slot is one LDS.32 at random in 256 words that all lanes share");
  const std::string vector = "a slot is one LDS.128 at ", grouped = ", neighbours share one",
                    strided = ", every n-th lane shares one";
  add_loop<Vectors<4, true>>(all, "lds128_4_grouped", kTurns, 0,
                             vector + "4 distinct addresses a warp" + grouped);
  add_loop<Vectors<4, false>>(all, "lds128_4_strided", kTurns, 0,
                              vector + "4 distinct addresses a warp" + strided);
  add_loop<Vectors<8, true>>(all, "lds128_8_grouped", kTurns, 0,
                             vector + "8 distinct addresses a warp" + grouped);
  add_loop<Vectors<8, false>>(all, "lds128_8_strided", kTurns, 0,
                              vector + "8 distinct addresses a warp" + strided);
  add_loop<Vectors<32, true>>(all, "lds128_32", kTurns, 4, vector + "32 distinct addresses a warp");
  add_loop<Matrices>(all, "ldmatrix_x4", kTurns, 4, "a slot is one LDSM.x4 without conflicts");
  add_loop<Shuffles>(all, "shfl", kTurns, 1, "a slot is one SHFL");
  add_loop<Copies<8>>(all, "cp_async_16", kTurns, 0,
                      "a slot is one cp.async of 16 bytes a lane from L2; three groups of 8 under "
                      "way");
  const std::string with = "a slot is one LDS.32 of a private table and ";
  add_loop<Mix<PrivateTable, Matrices>>(all, "lds32+ldmatrix", kTurns, 5, with + "one LDSM.x4");
  add_loop<Mix<PrivateTable, Shuffles>>(all, "lds32+shfl", kTurns, 0, with + "one SHFL");
  add_loop<Mix<PrivateTable, Copies<1>>>(all, "lds32+cp_async", kTurns, 0,
                                         with + "in every 8th slot one cp.async of 16 bytes");
  add_loop<Mix<PrivateTable, Mma<8>>>(all, "lds32+mma", kTurns, 0, with + "one mma.m16n8k16");
  add_loop<Mix<DecodeTable, Mma<4>>>(all, "lds32+prmt+mma", kTurns, 0,
                                     "a slot is one PRMT and LDS.32, and for every second slot one "
                                     "mma.m16n8k16");
  return all;
}

}  // namespace
}  // namespace primitives

int main(int count, char** arguments) {
  return primitives::run_program(primitives::experiments(), count, arguments);
}
