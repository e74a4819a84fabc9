// Collects the counts of a program of this folder while its kernels run. The environment variable
// HOST_CUDA_REPORT names a file to which the counts are written as JSON when the program ends.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <source_location>
#include <vector>

namespace host_cuda {

// The accesses to shared memory from one place in the source.
struct AccessSite {
  std::source_location where;
  const char* operation;
  unsigned bytes;           // bytes of each lane
  uint64_t accesses = 0;    // accesses of a whole warp
  uint64_t wavefronts = 0;  // wavefronts that they take
  uint64_t least = 0;       // wavefronts without any bank conflict
};

// The arguments of an accepted call of cuTensorMapEncodeTiled, with enumerators as numbers.
struct EncodedTensorMap {
  int type, swizzle, l2_promotion;
  uint64_t sizes[2], stride;
  uint32_t box[2], element_strides[2];
};

class Report {
 public:
  ~Report() {
    if (path_ != nullptr) write();
  }
  bool wanted() const { return path_ != nullptr; }

  // Returns the number of a site, and adds the site at its first access.
  size_t site_of(const std::source_location& where, const char* operation, unsigned bytes) {
    for (size_t i = 0; i < sites.size(); ++i) {
      const std::source_location& known = sites[i].where;
      if (known.line() == where.line() && known.column() == where.column() &&
          sites[i].bytes == bytes && std::strcmp(known.file_name(), where.file_name()) == 0 &&
          std::strcmp(sites[i].operation, operation) == 0) {
        return i;
      }
    }
    sites.push_back({where, operation, bytes});
    return sites.size() - 1;
  }

  std::vector<AccessSite> sites;
  std::vector<EncodedTensorMap> tensor_maps;
  // The ranges that the async proxy read and wrote, and the fences that make stores visible to it.
  uint64_t async_reads = 0, async_writes = 0, async_fences = 0;

 private:
  void write() const {
    std::FILE* file = std::fopen(path_, "w");
    if (file == nullptr) {
      std::fprintf(stderr, "host_cuda: cannot write HOST_CUDA_REPORT to %s\n", path_);
      std::abort();
    }
    const auto number = [](uint64_t value) { return static_cast<unsigned long long>(value); };
    std::fprintf(file, "{\"accesses\": [");
    for (const AccessSite& site : sites) {
      std::fprintf(file,
                   "%s\n {\"file\": \"%s\", \"line\": %u, \"function\": \"%s\", "
                   "\"operation\": \"%s\", \"bytes\": %u, \"accesses\": %llu, "
                   "\"wavefronts\": %llu, \"least\": %llu}",
                   &site == sites.data() ? "" : ",", site.where.file_name(), site.where.line(),
                   site.where.function_name(), site.operation, site.bytes, number(site.accesses),
                   number(site.wavefronts), number(site.least));
    }
    std::fprintf(file, "],\n \"tensor_maps\": [");
    for (const EncodedTensorMap& map : tensor_maps) {
      std::fprintf(file,
                   "%s\n {\"type\": %d, \"swizzle\": %d, \"l2_promotion\": %d, "
                   "\"sizes\": [%llu, %llu], \"stride\": %llu, \"box\": [%u, %u], "
                   "\"element_strides\": [%u, %u]}",
                   &map == tensor_maps.data() ? "" : ",", map.type, map.swizzle, map.l2_promotion,
                   number(map.sizes[0]), number(map.sizes[1]), number(map.stride), map.box[0],
                   map.box[1], map.element_strides[0], map.element_strides[1]);
    }
    std::fprintf(file,
                 "],\n \"async_reads\": %llu, \"async_writes\": %llu, \"async_fences\": %llu}\n",
                 number(async_reads), number(async_writes), number(async_fences));
    std::fclose(file);
  }

  const char* path_ = std::getenv("HOST_CUDA_REPORT");
};

inline Report report;

}  // namespace host_cuda
