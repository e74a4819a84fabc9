#include "cpu/lora_linear.h"

#include <memory>

#include "cpu/cpu_features.h"
#include "cpu/parallel.h"

namespace pylora::cpu {
namespace {

constexpr int64_t kGrain = 4096;

Project* project_for(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa >= CpuIsa::kAvx512) return project_avx512;
  if (isa >= CpuIsa::kAvx2) return project_avx2;
#endif
  (void)isa;
  return project_portable;
}

Gather* gather_for(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa >= CpuIsa::kAvx512) return gather_avx512;
  if (isa >= CpuIsa::kAvx2) return gather_avx2;
#endif
  (void)isa;
  return gather_portable;
}

std::unique_ptr<float[]> low_rank_buffer(int64_t count) {
  std::unique_ptr<float[]> buffer(new float[static_cast<size_t>(count + kLowPadding)]);
  for (int64_t i = 0; i < kLowPadding; ++i) buffer[static_cast<size_t>(count + i)] = 0.0f;
  return buffer;
}

// low = scaling * act(h)
std::unique_ptr<float[]> scaled_activation(const LoraLinear& op) {
  const int64_t count = op.x.rows * op.lora_A.rank;
  auto low = low_rank_buffer(count);
  parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      low[i] = static_cast<float>(activate(op.activation, op.h[i]) * op.scaling);
    }
  });
  return low;
}

}  // namespace

void lora_linear(const LoraLinear& op) {
  const CpuIsa isa = cpu_isa();
  project_for(isa)(op.x, op.lora_A, op.lora_A_bias, op.h);
  const auto low = scaled_activation(op);
  LinearProblem linear = op.linear;
  linear.low = low.get();
  linear.adapter = op.lora_B.data;
  linear.adapter_dtype = op.lora_B.dtype;
  linear.rank = op.lora_B.rank;
  run_linear(linear);
}

void lora_linear_backward(const LoraLinear& op) {
  const CpuIsa isa = cpu_isa();
  const int64_t rank = op.lora_A.rank;
  const int64_t count = op.x.rows * rank;
  const TokenMatrix grad{op.linear.x, op.linear.dtype, op.linear.rows, op.linear.weight.rows, {}};

  // 1. dh
  std::unique_ptr<float[]> dh;
  if (op.linear.y != nullptr || op.dlora_A != nullptr || op.dlora_A_bias != nullptr) {
    dh = low_rank_buffer(count);
    project_for(isa)(grad, op.lora_B, nullptr, dh.get());
    parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        dh[i] = static_cast<float>(activation_slope(op.activation, op.h[i]) * op.scaling * dh[i]);
      }
    });
  }

  // 2. dx
  if (op.linear.y != nullptr) {
    LinearProblem linear = op.linear;
    linear.low = dh.get();
    linear.adapter = op.lora_A.data;
    linear.adapter_dtype = op.lora_A.dtype;
    linear.rank = rank;
    linear.dropout = op.x.dropout;
    run_linear(linear);
  }

  // 3. The adapter's gradients, in one pass over x and one over the gradient.
  if (op.dlora_A != nullptr) {
    AdapterFactor out = op.lora_A;
    out.data = op.dlora_A;
    gather_for(isa)(op.x, dh.get(), out, nullptr);
  }
  if (op.dlora_B != nullptr || op.grad_sums != nullptr) {
    std::unique_ptr<float[]> low;
    if (op.dlora_B != nullptr) low = scaled_activation(op);
    AdapterFactor out = op.lora_B;
    out.data = op.dlora_B;
    gather_for(isa)(grad, low.get(), out, op.grad_sums);
  }
  if (op.dlora_A_bias != nullptr) {
    for (int64_t j = 0; j < rank; ++j) {
      double sum = 0.0;
      for (int64_t m = 0; m < op.x.rows; ++m) sum += dh[m * rank + j];
      op.dlora_A_bias[j] = static_cast<float>(sum);
    }
  }
}

}  // namespace pylora::cpu
