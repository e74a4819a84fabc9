// CPU side of the linear ops: tensor -> checks -> kernel. Weights are NF4, but for lora_linear_dense,
// which takes a few tokens; a dense base of more tokens goes to torch's own matmul in Python.
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/boxed.h"
#include "common/prepared.h"
#include "cpu/bind.h"
#include "cpu/lora_linear.h"
#include "cpu/nf4_linear.h"

namespace pylora::cpu {
namespace {

NF4LinearArgs to_problem(const Tokens& x, const NF4Matrix& weight) {
  STD_TORCH_CHECK(x.cols > 0, x.name, " must have a column or more, got shape ",
                  to_string(x.shape));
  NF4LinearArgs problem;
  problem.dtype = x.dtype();
  problem.x = x.data;
  problem.tokens = x.count;
  problem.weight = weight;
  return problem;
}

// A checked call of nf4_linear.
struct Nf4Forward {
  Nf4Forward(const Tokens& x, NF4Tensors& weight, int64_t out_features, std::optional<Tensor>& bias)
      : problem(to_problem(x, to_matrix(weight, out_features, x.cols))) {
    sum.add("bias", bias, out_features, x);
    problem.bias = sum.data();
  }

  void run(void* y) {
    problem.y = y;
    run_linear(problem);
  }

  NF4LinearArgs problem;
  BiasSum sum;
};

Tensor nf4_linear_cpu(const Tensor& given_x, NF4Tensors& weight, int64_t out_features,
                      std::optional<Tensor>& bias) {
  const Tokens x("x", given_x);
  Nf4Forward forward(x, weight, out_features, bias);
  Tensor y = x.new_rows(out_features);
  forward.run(y.mutable_data_ptr());
  return y;
}

void nf4_linear_prepared(Tokens& x, const PreparedCall& call, NF4Tensors& weight,
                         int64_t& out_features, std::optional<Tensor>& bias) {
  Nf4Forward(x, weight, out_features, bias).run(call.y);
}

Tensor nf4_linear_backward_cpu(const Tensor& given_grad, NF4Tensors& weight, int64_t in_features) {
  const Tokens grad("grad", given_grad);
  NF4LinearArgs problem = to_problem(grad, to_matrix(weight, grad.cols, in_features));
  Tensor dx = grad.new_rows(in_features);
  problem.y = dx.mutable_data_ptr();
  problem.backward = true;
  run_linear(problem);
  return dx;
}

AdapterFactor to_factor(const Tensor& factor, int64_t rank, bool rank_first) {
  return {const_cast<void*>(factor.const_data_ptr()), to_dtype("lora_A", factor.scalar_type()),
          rank, rank_first};
}

// What forward and backward share, but for the rows that meet the weight.
LoraLinearArgs to_lora_linear(const Tokens& x, int64_t out_features, Tensor& lora_A, Tensor& lora_B,
                              const LowRankOptions& options) {
  const int64_t rank = check_rank(lora_A, 2, kMaxRank);
  const ScalarType type = lora_A.scalar_type();
  check_factor("lora_A", lora_A, {rank, x.cols}, type, x);
  check_factor("lora_B", lora_B, {out_features, rank}, type, x);
  LoraLinearArgs op;
  op.x.data = x.data;
  op.x.dtype = x.dtype();
  op.x.tokens = x.count;
  op.x.cols = x.cols;
  op.x.dropout = to_dropout(options.dropout(x));
  op.lora_A = to_factor(lora_A, rank, true);
  op.lora_B = to_factor(lora_B, rank, false);
  op.scaling = static_cast<float>(options.scaling);
  op.activation = options.activation();
  return op;
}

// A checked call of lora_linear.
struct LoraForward {
  LoraForward(const Tokens& x, NF4Tensors& weight, int64_t out_features, LowRankTensors& low) {
    const NF4Matrix matrix = to_matrix(weight, out_features, x.cols);
    op = to_lora_linear(x, out_features, low.lora_A, low.lora_B, low.options);
    sum.add("bias", low.bias, out_features, x);
    sum.add("lora_B_bias", low.lora_B_bias, out_features, x, op.scaling);
    low_sum.add("lora_A_bias", low.lora_A_bias, op.lora_A.rank, x);
    op.linear = to_problem(x, matrix);
    op.linear.bias = sum.data();
    op.lora_A_bias = low_sum.data();
  }

  void run(void* y, float* h) {
    op.linear.y = y;
    op.h = h;
    lora_linear(op);
  }

  LoraLinearArgs op;
  BiasSum sum, low_sum;
};

// A checked call of lora_linear over a dense weight.
struct DenseLoraForward {
  DenseLoraForward(const Tokens& x, Tensor& weight, LowRankTensors& low) {
    STD_TORCH_CHECK(x.cols > 0, "x must have a column or more, got shape ", to_string(x.shape));
    STD_TORCH_CHECK(x.count <= kMaxDenseM, "x must have ", kMaxDenseM,
                    " rows or fewer over a dense weight, got ", x.count);
    check_given("weight", weight);
    check_dim("weight", weight, 2);
    out_features = weight.size(0);
    check_factor("weight", weight, {out_features, x.cols}, x.tensor.scalar_type(), x);
    op = to_lora_linear(x, out_features, low.lora_A, low.lora_B, low.options);
    sum.add("bias", low.bias, out_features, x);
    sum.add("lora_B_bias", low.lora_B_bias, out_features, x, op.scaling);
    low_sum.add("lora_A_bias", low.lora_A_bias, op.lora_A.rank, x);
    op.lora_A_bias = low_sum.data();
    linear.x = x.data;
    linear.dtype = x.dtype();
    linear.tokens = x.count;
    linear.weight = {weight.const_data_ptr(), out_features, x.cols};
    linear.bias = sum.data();
  }

  void run(void* y, float* h) {
    linear.y = y;
    op.h = h;
    lora_linear_dense(op, linear);
  }

  int64_t out_features;
  LoraLinearArgs op;
  DenseLinearArgs linear;
  BiasSum sum, low_sum;
};

// The results (y, h) of a checked call.
template <class Forward>
std::tuple<Tensor, Tensor> results_of(const Tokens& x, int64_t out_features, Forward forward) {
  Tensor y = x.new_rows(out_features);
  Tensor h = x.new_rows(forward.op.lora_A.rank, ScalarType::Float);
  forward.run(y.mutable_data_ptr(), h.mutable_data_ptr<float>());
  return {y, h};
}

// Runs a checked call whose h may not be wanted.
template <class Forward>
void run_prepared(const Tokens& x, const PreparedCall& call, Forward forward) {
  std::vector<float> h;
  if (call.h == nullptr) h.resize(static_cast<size_t>(x.count * forward.op.lora_A.rank));
  forward.run(call.y, call.h == nullptr ? h.data() : call.h);
}

std::tuple<Tensor, Tensor> lora_linear_cpu(const Tensor& given_x, NF4Tensors& weight,
                                           int64_t out_features, LowRankTensors& low) {
  const Tokens x("x", given_x);
  return results_of(x, out_features, LoraForward(x, weight, out_features, low));
}

void lora_linear_prepared(Tokens& x, const PreparedCall& call, NF4Tensors& weight,
                          int64_t& out_features, LowRankTensors& low) {
  low.options.take(call);
  run_prepared(x, call, LoraForward(x, weight, out_features, low));
}

std::tuple<Tensor, Tensor> lora_linear_dense_cpu(const Tensor& given_x, Tensor& weight,
                                                 LowRankTensors& low) {
  const Tokens x("x", given_x);
  DenseLoraForward forward(x, weight, low);
  const int64_t out_features = forward.out_features;
  return results_of(x, out_features, std::move(forward));
}

void lora_linear_dense_prepared(Tokens& x, const PreparedCall& call, Tensor& weight,
                                LowRankTensors& low) {
  low.options.take(call);
  run_prepared(x, call, DenseLoraForward(x, weight, low));
}

// The gradients that output_mask leaves out are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_backward_cpu(
    const Tensor& given_grad, const Tensor& given_x, const Tensor& given_h, NF4Tensors& weight,
    Tensor& lora_A, Tensor& lora_B, const LowRankOptions& options,
    const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 7, "output_mask must have 7 values, got ",
                  output_mask.size());
  STD_TORCH_CHECK(!output_mask[1], "output_mask must not ask for dweight: the weight is NF4");
  const Tokens grad("grad", given_grad), x("x", given_x), h("h", given_h);
  check_dtype("grad", grad.tensor, x.tensor.scalar_type());
  STD_TORCH_CHECK(grad.count == x.count, "grad must have as many rows as x (", x.count, "), got ",
                  grad.count);
  const NF4Matrix matrix = to_matrix(weight, grad.cols, x.cols);
  LoraLinearArgs op = to_lora_linear(x, matrix.rows, lora_A, lora_B, options);
  const int64_t rank = op.lora_A.rank;
  check_dtype("h", h.tensor, ScalarType::Float);
  check_numel("h", h.tensor, x.count * rank, "the rank, ", rank, ", for every row of x");

  Tensor dx = new_like(x.tensor, output_mask[0]);
  Tensor dlora_A = new_like(lora_A, output_mask[2]);
  Tensor dlora_B = new_like(lora_B, output_mask[3]);
  std::vector<float> low_sums(output_mask[5] ? static_cast<size_t>(rank) : 0);
  const bool wants_sums = output_mask[4] || output_mask[6];
  std::vector<float> grad_sums(wants_sums ? static_cast<size_t>(matrix.rows) : 0);
  op.linear = to_problem(grad, matrix);
  op.linear.y = output_mask[0] ? dx.mutable_data_ptr() : nullptr;
  op.linear.backward = true;
  op.h = const_cast<float*>(h.tensor.const_data_ptr<float>());
  op.dlora_A = output_mask[2] ? dlora_A.mutable_data_ptr() : nullptr;
  op.dlora_B = output_mask[3] ? dlora_B.mutable_data_ptr() : nullptr;
  op.dlora_A_bias = low_sums.empty() ? nullptr : low_sums.data();
  op.grad_sums = grad_sums.empty() ? nullptr : grad_sums.data();
  lora_linear_backward(op);
  const std::vector<float> none;
  return {dx,
          new_like(x.tensor, false),
          dlora_A,
          dlora_B,
          to_tensor(output_mask[4] ? grad_sums : none, 1.0f, grad.tensor),
          to_tensor(low_sums, 1.0f, lora_A),
          to_tensor(output_mask[6] ? grad_sums : none, op.scaling, lora_B)};
}

}  // namespace
}  // namespace pylora::cpu

STABLE_TORCH_LIBRARY_IMPL(pylora_C, CPU, m) {
  using namespace pylora::cpu;
  using pylora::boxed;
  using pylora::Prepared;
  m.impl("nf4_linear", boxed<nf4_linear_cpu>);
  m.impl("nf4_linear_backward", boxed<nf4_linear_backward_cpu>);
  m.impl("prepare_nf4_linear", boxed<Prepared<nf4_linear_prepared>::make>);
  m.impl("lora_linear", boxed<lora_linear_cpu>);
  m.impl("lora_linear_backward", boxed<lora_linear_backward_cpu>);
  m.impl("prepare_lora_linear", boxed<Prepared<lora_linear_prepared>::make>);
  m.impl("lora_linear_dense", boxed<lora_linear_dense_cpu>);
  m.impl("prepare_lora_linear_dense", boxed<Prepared<lora_linear_dense_prepared>::make>);
}
