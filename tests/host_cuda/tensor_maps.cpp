// Asks csrc/cuda/hopper/tensor_map.cu to describe right and wrong matrices. Standard output has a
// line for each matrix: its name and the answer. The driver's stand-in says on standard error which
// demand a wrong matrix does not meet.
#include <cstdio>
#include <cstring>

#include "cuda/hopper/tensor_map.cuh"

namespace {

using namespace pylora;
using namespace pylora::cuda;

alignas(256) uint8_t memory[1024];

TiledMatrix matrix_of(int item_bytes, int64_t rows, int64_t cols, int64_t pitch, int tile_rows,
                      Swizzle swizzle) {
  TiledMatrix matrix;
  matrix.data = memory;
  matrix.item_bytes = item_bytes;
  matrix.rows = rows;
  matrix.cols = cols;
  matrix.pitch = pitch;
  matrix.tile_rows = tile_rows;
  matrix.swizzle = swizzle;
  return matrix;
}

void ask(const char* name, const TiledMatrix& matrix) {
  TensorMap map;
  const cudaError_t error = encode_tensor_map(matrix, &map);
  std::printf("%s: %s\n", name, error == cudaSuccess ? "accepted" : "refused");
}

}  // namespace

int main() {
  ask("x", matrix_of(2, 300, 640, 1280, 256, Swizzle::k128));
  ask("qweight", matrix_of(1, 4096, 2048, 2048, 128, Swizzle::k32));
  ask("low", matrix_of(4, 300, 5, 32, 128, Swizzle::k128));
  ask("one row", matrix_of(2, 1, 64, 128, 1, Swizzle::k128));
  ask("most rows", matrix_of(1, int64_t{1} << 32, 32, 32, 128, Swizzle::k32));
  ask("widest row", matrix_of(1, 2, 64, (int64_t{1} << 40) - 16, 128, Swizzle::k32));

  TiledMatrix odd = matrix_of(2, 300, 640, 1280, 256, Swizzle::k128);
  odd.data = memory + 8;
  ask("odd address", odd);
  ask("no rows", matrix_of(2, 0, 640, 1280, 256, Swizzle::k128));
  ask("no columns", matrix_of(2, 300, 0, 1280, 256, Swizzle::k128));
  ask("too many rows", matrix_of(1, (int64_t{1} << 32) + 1, 32, 32, 128, Swizzle::k32));
  ask("odd pitch", matrix_of(4, 300, 5, 20, 128, Swizzle::k128));
  ask("long pitch", matrix_of(1, 2, 64, int64_t{1} << 40, 128, Swizzle::k32));
  ask("short pitch", matrix_of(2, 300, 640, 640, 256, Swizzle::k128));
  ask("no tile", matrix_of(2, 300, 640, 1280, 0, Swizzle::k128));
  ask("tall tile", matrix_of(2, 300, 640, 1280, 257, Swizzle::k128));
}
