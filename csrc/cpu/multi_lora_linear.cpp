#include "cpu/multi_lora_linear.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace pylora::cpu {
namespace {

// A thread is woken for at least so many products, or so many bytes to clear.
constexpr int64_t kShareProducts = 1 << 17;
constexpr int64_t kShareBytes = 1 << 18;

constexpr KernelTable<AddLowRank> kAddLowRank{
    add_low_rank_portable,
    PYLORA_X86_KERNEL(add_low_rank_avx2),
    PYLORA_X86_KERNEL(add_low_rank_avx512),
};

// The tokens that have an adapter, adapter by adapter, and in ascending order within one.
struct TokenGroups {
  std::vector<int64_t> rows;
  std::vector<AdapterGroup> groups;

  explicit TokenGroups(const MultiLoraArgs& args) {
    const auto has_adapter = [&](int64_t id) { return id >= 0 && id < args.adapters; };
    std::vector<int64_t> next(static_cast<size_t>(args.adapters));
    for (int64_t m = 0; m < args.x.tokens; ++m) {
      if (has_adapter(args.ids[m])) ++next[static_cast<size_t>(args.ids[m])];
    }
    int64_t first = 0;
    for (int64_t i = 0; i < args.adapters; ++i) {
      int64_t& count = next[static_cast<size_t>(i)];
      if (count > 0) groups.push_back({i, first, count});
      first += std::exchange(count, first);
    }
    rows.resize(static_cast<size_t>(first));
    for (int64_t m = 0; m < args.x.tokens; ++m) {
      if (has_adapter(args.ids[m])) {
        rows[static_cast<size_t>(next[static_cast<size_t>(args.ids[m])]++)] = m;
      }
    }
  }

  int64_t tokens() const { return static_cast<int64_t>(rows.size()); }

  TokenMatrix tokens_of(const TokenMatrix& all, const AdapterGroup& group) const {
    TokenMatrix own = all;
    own.tokens = group.count;
    own.rows = rows.data() + group.first;
    return own;
  }
};

// The factor of one adapter of a stack; `cols` is the factor's other side.
AdapterFactor factor_of(const AdapterFactor& stack, int64_t adapter, int64_t cols) {
  AdapterFactor own = stack;
  own.data = static_cast<char*>(stack.data) + adapter * stack.rank * cols * dtype_size(stack.dtype);
  return own;
}

// Runs the body on each group. If no group has more than a thread's share of the tokens, the
// threads share out the groups; otherwise all threads work on one group after the other.
template <class Body>
void for_each_group(const TokenGroups& tokens, int64_t products_of_token, const Body& body) {
  const int64_t total = tokens.tokens();
  int64_t largest = 0;
  for (const AdapterGroup& group : tokens.groups) largest = std::max(largest, group.count);
  const int64_t shares =
      std::clamp<int64_t>(total * products_of_token / kShareProducts, 1, num_threads());
  if (shares == 1 || largest * shares > total) {
    for (const AdapterGroup& group : tokens.groups) body(group);
    return;
  }
  parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (const AdapterGroup& group : tokens.groups) {
      const int64_t share = (2 * group.first + group.count) * shares / (2 * total);
      if (share >= begin && share < end) body(group);
    }
  });
}

// The projections of all tokens by the factors of their adapters, in the order of the groups.
std::unique_ptr<float[]> projected(const TokenGroups& tokens, const TokenMatrix& x,
                                   const AdapterFactor& stack) {
  auto out = low_rank_buffer(tokens.tokens() * stack.rank);
  for_each_group(tokens, x.cols * stack.rank, [&](const AdapterGroup& group) {
    project(tokens.tokens_of(x, group), factor_of(stack, group.adapter, x.cols), nullptr,
            out.get() + group.first * stack.rank);
  });
  return out;
}

// Multiplies values [tokens, rank], in the order of the groups, by the scaling of each adapter.
void scale(const TokenGroups& tokens, const float* scalings, int64_t rank, float* values) {
  for (const AdapterGroup& group : tokens.groups) {
    const int64_t begin = group.first * rank, end = begin + group.count * rank;
    for (int64_t i = begin; i < end; ++i) values[i] *= scalings[group.adapter];
  }
}

// Adds low [tokens, rank], in the order of the groups, times the stack's factors to the rows of out
// [M, cols].
void add_products(const TokenGroups& tokens, const float* low, const AdapterFactor& stack,
                  void* out, DType dtype, int64_t cols) {
  const int64_t rank = stack.rank;
  const auto turned = low_rank_buffer(tokens.tokens() * rank);
  for (const AdapterGroup& group : tokens.groups) {
    const float* from = low + group.first * rank;
    float* to = turned.get() + group.first * rank;
    for (int64_t m = 0; m < group.count; ++m) {
      for (int64_t r = 0; r < rank; ++r) to[r * group.count + m] = from[m * rank + r];
    }
  }
  LowRankSum sum;
  sum.out = out;
  sum.dtype = dtype;
  sum.cols = cols;
  sum.rows = tokens.rows.data();
  sum.groups = tokens.groups;
  sum.low = turned.get();
  sum.factor = stack;
  kAddLowRank.choose(false)(sum);
}

// gradients = low^T x for each adapter; zeros for an adapter without tokens. `stack` says what the
// gradients look like.
void gather_gradients(const TokenGroups& tokens, const TokenMatrix& x, const float* low,
                      AdapterFactor stack, int64_t adapters, void* gradients) {
  stack.data = gradients;
  const int64_t bytes = stack.rank * x.cols * dtype_size(stack.dtype);
  std::vector<bool> used(static_cast<size_t>(adapters));
  for (const AdapterGroup& group : tokens.groups) used[static_cast<size_t>(group.adapter)] = true;
  parallel_for(0, adapters, ceil_div(kShareBytes, bytes + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!used[static_cast<size_t>(i)]) {
        std::memset(factor_of(stack, i, x.cols).data, 0, static_cast<size_t>(bytes));
      }
    }
  });
  Gather* const gather = gather_for(x.dtype, stack.dtype);
  for_each_group(tokens, x.cols * stack.rank, [&](const AdapterGroup& group) {
    gather(tokens.tokens_of(x, group), low + group.first * stack.rank,
           factor_of(stack, group.adapter, x.cols), nullptr);
  });
}

}  // namespace

void multi_lora_linear(const MultiLoraArgs& args) {
  const int64_t rank = args.lora_A.rank;
  const TokenGroups tokens(args);
  const auto low = projected(tokens, args.x, args.lora_A);
  std::fill_n(args.h, args.x.tokens * rank, 0.0f);
  for (int64_t m = 0; m < tokens.tokens(); ++m) {
    std::copy_n(low.get() + m * rank, rank, args.h + tokens.rows[static_cast<size_t>(m)] * rank);
  }
  scale(tokens, args.scalings, rank, low.get());
  add_products(tokens, low.get(), args.lora_B, args.y, args.x.dtype, args.out_features);
}

void multi_lora_linear_backward(const MultiLoraArgs& args) {
  const int64_t rank = args.lora_A.rank;
  const TokenGroups tokens(args);
  const TokenMatrix grad{args.grad, args.x.dtype, args.x.tokens, args.out_features, {}, nullptr};

  // 1. dx and the gradient of lora_A, which need dh
  if (args.dx != nullptr || args.dlora_A != nullptr) {
    const auto dh = projected(tokens, grad, args.lora_B);
    scale(tokens, args.scalings, rank, dh.get());
    if (args.dx != nullptr) {
      add_products(tokens, dh.get(), args.lora_A, args.dx, args.x.dtype, args.x.cols);
    }
    if (args.dlora_A != nullptr) {
      gather_gradients(tokens, args.x, dh.get(), args.lora_A, args.adapters, args.dlora_A);
    }
  }

  // 2. The gradient of lora_B
  if (args.dlora_B != nullptr) {
    const auto low = low_rank_buffer(tokens.tokens() * rank);
    for (int64_t m = 0; m < tokens.tokens(); ++m) {
      std::copy_n(args.h + tokens.rows[static_cast<size_t>(m)] * rank, rank, low.get() + m * rank);
    }
    scale(tokens, args.scalings, rank, low.get());
    gather_gradients(tokens, grad, low.get(), args.lora_B, args.adapters, args.dlora_B);
  }
}

}  // namespace pylora::cpu
