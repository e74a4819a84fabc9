// Reads what all programs of linear ops read: the weight, and the limits of the GPU to plan for.
// Each program has its own Header type; the fields that are read here have the same names in all.
#pragma once

#include "common/nf4.h"
#include "cuda/common/device.cuh"
#include "stdin_arrays.h"

template <class Header>
pylora::NF4Matrix read_weight(const Header& in, const float** offset) {
  pylora::NF4Matrix weight;
  weight.rows = in.rows;
  weight.cols = in.cols;
  weight.blocksize = in.blocksize;
  weight.nested_blocksize = in.nested_blocksize;
  weight.qweight = read_array<uint8_t>(in.rows * in.cols / 2);
  const int64_t blocks = weight.num_blocks();
  if (in.nested != 0) {
    weight.absmax_q = read_array<uint8_t>(blocks);
    weight.nested_absmax = read_array<float>(pylora::ceil_div(blocks, in.nested_blocksize));
    weight.nested_code = read_array<float>(256);
    *offset = read_array<float>(1);
  } else {
    weight.absmax = read_array<float>(blocks);
  }
  return weight;
}

template <class Header>
pylora::cuda::DeviceLimits limits_of(const Header& in) {
  pylora::cuda::DeviceLimits limits;
  limits.processors = static_cast<int>(in.processors);
  limits.shared_per_sm = in.shared_per_sm;
  limits.shared_per_cta = in.shared_per_sm - 1024;
  return limits;
}
