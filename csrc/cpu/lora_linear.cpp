#include "cpu/lora_linear.h"

#include <memory>

#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace pylora::cpu {
namespace {

constexpr int64_t kGrain = 4096;

constexpr KernelTable<Project> kProject{
    project_portable,
    PYLORA_X86_KERNEL(project_avx2),
    PYLORA_X86_KERNEL(project_avx512),
    PYLORA_X86_KERNEL(project_avx512_bf16),
    PYLORA_X86_KERNEL(project_amx_emulated),
    PYLORA_X86_KERNEL(project_amx),
};
constexpr KernelTable<Gather> kGather{
    gather_portable,
    PYLORA_X86_KERNEL(gather_avx2),
    PYLORA_X86_KERNEL(gather_avx512),
    PYLORA_X86_KERNEL(gather_avx512_bf16),
    PYLORA_X86_KERNEL(gather_amx_emulated),
    PYLORA_X86_KERNEL(gather_amx),
};

bool are_bf16(DType tokens, DType factor) {
  return tokens == DType::kBFloat16 && factor == DType::kBFloat16;
}

// low = scaling * act(h)
std::unique_ptr<float[]> scaled_activation(const LoraLinearArgs& args) {
  const int64_t count = args.x.tokens * args.lora_A.rank;
  auto low = low_rank_buffer(count);
  parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    if (args.activation == Activation::kIdentity) {  // the same numbers, but not one by one
      for (int64_t i = begin; i < end; ++i) low[i] = args.h[i] * args.scaling;
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      low[i] = static_cast<float>(activate(args.activation, args.h[i]) * args.scaling);
    }
  });
  return low;
}

// Computes h, and returns low.
std::unique_ptr<float[]> projected(const LoraLinearArgs& args) {
  project(args.x, args.lora_A, args.lora_A_bias, args.h);
  return scaled_activation(args);
}

template <class LinearArgs>
void set_low_rank(const LoraLinearArgs& args, const float* low, LinearArgs& linear) {
  linear.low = low;
  linear.adapter = args.lora_B.data;
  linear.adapter_dtype = args.lora_B.dtype;
  linear.rank = args.lora_B.rank;
}

}  // namespace

void project(const TokenMatrix& x, const AdapterFactor& factor, const float* bias, float* out) {
  kProject.choose(are_bf16(x.dtype, factor.dtype))(x, factor, bias, out);
}

Gather* gather_for(DType tokens, DType factor) { return kGather.choose(are_bf16(tokens, factor)); }

std::unique_ptr<float[]> low_rank_buffer(int64_t count) {
  std::unique_ptr<float[]> buffer(new float[static_cast<size_t>(count + kLowPadding)]);
  for (int64_t i = 0; i < kLowPadding; ++i) buffer[static_cast<size_t>(count + i)] = 0.0f;
  return buffer;
}

void column_sums(const float* values, int64_t rows, int64_t cols, float* sums) {
  constexpr int64_t kStrip = 256;
  parallel_for(
      0, ceil_div(cols, kStrip), ceil_div(kGrain, kStrip), [&](int64_t begin, int64_t end) {
        for (int64_t col = begin * kStrip; col < end * kStrip && col < cols; col += kStrip) {
          const int64_t count = cols - col < kStrip ? cols - col : kStrip;
          double totals[kStrip] = {};
          for (int64_t m = 0; m < rows; ++m) {
            for (int64_t j = 0; j < count; ++j) totals[j] += values[m * cols + col + j];
          }
          for (int64_t j = 0; j < count; ++j) sums[col + j] = static_cast<float>(totals[j]);
        }
      });
}

void lora_linear(const LoraLinearArgs& args) {
  const auto low = projected(args);
  NF4LinearArgs linear = args.linear;
  set_low_rank(args, low.get(), linear);
  run_linear(linear);
}

void lora_linear_dense(const LoraLinearArgs& args, DenseLinearArgs linear) {
  const auto low = projected(args);
  set_low_rank(args, low.get(), linear);
  dense_linear(linear);
}

void lora_linear_backward(const LoraLinearArgs& args) {
  const int64_t rank = args.lora_A.rank;
  const int64_t count = args.x.tokens * rank;
  const TokenMatrix grad{
      args.linear.x, args.linear.dtype, args.linear.tokens, args.linear.weight.rows, {}, nullptr};

  // 1. dh
  std::unique_ptr<float[]> dh;
  if (args.linear.y != nullptr || args.dlora_A != nullptr || args.dlora_A_bias != nullptr) {
    dh = low_rank_buffer(count);
    project(grad, args.lora_B, nullptr, dh.get());
    parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
      if (args.activation == Activation::kIdentity) {
        for (int64_t i = begin; i < end; ++i) dh[i] *= args.scaling;
        return;
      }
      for (int64_t i = begin; i < end; ++i) {
        dh[i] =
            static_cast<float>(activation_slope(args.activation, args.h[i]) * args.scaling * dh[i]);
      }
    });
  }

  // 2. dx
  if (args.linear.y != nullptr) {
    NF4LinearArgs linear = args.linear;
    linear.low = dh.get();
    linear.adapter = args.lora_A.data;
    linear.adapter_dtype = args.lora_A.dtype;
    linear.rank = rank;
    linear.dropout = args.x.dropout;
    run_linear(linear);
  }

  // 3. The adapter's gradients. They take one pass over x and one over the gradient.
  if (args.dlora_A != nullptr) {
    AdapterFactor out = args.lora_A;
    out.data = args.dlora_A;
    gather_for(args.x.dtype, out.dtype)(args.x, dh.get(), out, nullptr);
  }
  if (args.dlora_B != nullptr || args.grad_sums != nullptr) {
    std::unique_ptr<float[]> low;
    if (args.dlora_B != nullptr) low = scaled_activation(args);
    AdapterFactor out = args.lora_B;
    out.data = args.dlora_B;
    gather_for(grad.dtype, out.dtype)(grad, low.get(), out, args.grad_sums);
  }
  if (args.dlora_A_bias != nullptr) {
    column_sums(dh.get(), args.x.tokens, rank, args.dlora_A_bias);
  }
}

}  // namespace pylora::cpu
