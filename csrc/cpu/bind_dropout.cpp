// CPU side of dropout: tensor -> checks -> kernel.
#include <optional>

#include "common/boxed.h"
#include "cpu/bind.h"
#include "cpu/dropout.h"

namespace pylora::cpu {
namespace {

Tensor dropout_cpu(const Tensor& given_x, double p, const std::optional<Tensor>& seed) {
  const Tokens x("x", given_x);
  DropoutArgs args;
  args.dropout = to_dropout(check_dropout(p, seed, nullptr, x));
  STD_TORCH_CHECK(args.dropout.enabled, "dropout_p must be above 0, got ", p);
  Tensor y = x.new_rows(x.cols);
  args.x = x.data;
  args.y = y.mutable_data_ptr();
  args.dtype = x.dtype();
  args.count = x.count * x.cols;
  drop_elements(args);
  return y;
}

}  // namespace
}  // namespace pylora::cpu

STABLE_TORCH_LIBRARY_IMPL(pylora_C, CPU, m) {
  using namespace pylora::cpu;
  m.impl("dropout", pylora::boxed<dropout_cpu>);
}
