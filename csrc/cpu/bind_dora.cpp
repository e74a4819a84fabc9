// CPU side of the rescaling of DoRA: tensor -> checks -> kernel.
#include <optional>
#include <tuple>
#include <vector>

#include "common/boxed.h"
#include "common/prepared.h"
#include "cpu/bind.h"
#include "cpu/dora_linear.h"

namespace pylora::cpu {
namespace {

// The values of a vector of any dtype in fp32.
std::vector<float> widened(const char* name, Tensor& values, const Tokens& x) {
  check_given(name, values);
  check_vector(name, values, x.cols, x);
  std::vector<float> out(static_cast<size_t>(x.cols));
  visit_dtype(to_dtype(name, values.scalar_type()), [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(values.const_data_ptr());
    for (size_t i = 0; i < out.size(); ++i) out[i] = to_float(data[i]);
  });
  return out;
}

// A checked call; its norm stays for the gradient of the magnitude.
struct Rescaling {
  Rescaling(const Tokens& x, Tensor& magnitude, Tensor& given_norm)
      : factors(widened("magnitude", magnitude, x)), norm(widened("norm", given_norm, x)) {
    for (size_t i = 0; i < factors.size(); ++i) factors[i] /= norm[i];
    args.values = x.data;
    args.dtype = x.dtype();
    args.tokens = x.count;
    args.cols = x.cols;
    args.factors = factors.data();
  }

  std::vector<float> factors, norm;
  RescaleArgs args;
};

// Writes y, which may be the product itself.
void run_forward(const Tokens& product, Tensor& magnitude, Tensor& norm,
                 std::optional<Tensor>& bias, void* y) {
  Rescaling call(product, magnitude, norm);
  BiasSum sum;
  sum.add("bias", bias, product.cols, product);
  call.args.bias = sum.data();
  call.args.out = y;
  dora_rescale(call.args);
}

Tensor dora_rescale_cpu(const Tensor& given_product, Tensor& magnitude, Tensor& norm,
                        std::optional<Tensor>& bias) {
  const Tokens product("product", given_product);
  Tensor y = product.new_rows(product.cols);
  run_forward(product, magnitude, norm, bias, y.mutable_data_ptr());
  return y;
}

void dora_rescale_prepared(Tokens& product, const PreparedCall& call, Tensor& magnitude,
                           Tensor& norm, std::optional<Tensor>& bias) {
  run_forward(product, magnitude, norm, bias, call.y);
}

std::tuple<Tensor, Tensor> dora_rescale_backward_cpu(const Tensor& given_grad,
                                                     const Tensor& given_product, Tensor& magnitude,
                                                     Tensor& norm) {
  const Tokens grad("grad", given_grad), product("product", given_product);
  check_dtype("product", product.tensor, grad.tensor.scalar_type());
  check_numel("product", product.tensor, grad.count * grad.cols, "as many elements as grad");
  Rescaling call(grad, magnitude, norm);
  Tensor dproduct = grad.new_rows(grad.cols);
  std::vector<float> sums(static_cast<size_t>(grad.cols));
  call.args.out = dproduct.mutable_data_ptr();
  call.args.product = product.data;
  call.args.sums = sums.data();
  dora_rescale(call.args);
  for (size_t i = 0; i < sums.size(); ++i) sums[i] /= call.norm[i];
  return {dproduct, to_tensor(sums, 1.0f, magnitude)};
}

}  // namespace
}  // namespace pylora::cpu

STABLE_TORCH_LIBRARY_IMPL(pylora_C, CPU, m) {
  using namespace pylora::cpu;
  using pylora::boxed;
  using pylora::Prepared;
  m.impl("dora_rescale", boxed<dora_rescale_cpu>);
  m.impl("prepare_dora_rescale", boxed<Prepared<dora_rescale_prepared>::make>);
  m.impl("dora_rescale_backward", boxed<dora_rescale_backward_cpu>);
}
