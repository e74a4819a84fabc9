// Every op of the extension, one schema a line, and the Python module pylora._C. The ops are
// reached as torch.ops.pylora_C.*; their public twins torch.ops.pylora.* (Python) add checks and
// gradients.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "common/activation.h"
#include "common/fingerprint.h"
#include "common/prepared.h"
#include "cpu/bottleneck_adapter.h"
#include "cpu/cpu_features.h"
#include "cpu/lora_linear.h"
#include "cuda/limits.h"

// clang-format off
#define NF4 "Tensor qweight, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, int blocksize, int nested_blocksize"
#define LORA_OPTIONS "float scaling, float dropout_p, Tensor? seed, int activation"
#define LOW_RANK "Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? lora_A_bias, Tensor? lora_B_bias, " LORA_OPTIONS
#define LORA NF4 ", int out_features, " LOW_RANK
#define ADAPTERS "Tensor lora_A, Tensor lora_B, Tensor adapter_ids, Tensor scalings"
#define NORM(name) "int " name ", Tensor? " name "_weight, Tensor? " name "_bias, float " name "_eps"
#define BOTTLENECK "Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, float scaling, int activation, float dropout_p, Tensor? seed, " NORM("norm_before") ", " NORM("norm_after")

STABLE_TORCH_LIBRARY(pylora_C, m) {
  m.def("nf4_quantize(Tensor weight, int blocksize) -> (Tensor qweight, Tensor absmax)");
  m.def("nf4_dequantize(" NF4 ", int[] shape, ScalarType dtype) -> Tensor");
  m.def("nf4_dequantize_into(" NF4 ", Tensor(a!) out) -> ()");
  m.def("nf4_dequantize_panel(" NF4 ", int out_features, int in_features, int row, int col, Tensor(a!) out) -> ()");
  m.def("nf4_linear(Tensor x, " NF4 ", int out_features, Tensor? bias) -> Tensor");
  m.def("nf4_linear_hopper(Tensor x, " NF4 ", int out_features, Tensor? bias) -> Tensor");
  m.def("nf4_linear_backward(Tensor grad, " NF4 ", int in_features) -> Tensor");
  m.def("lora_linear(Tensor x, " LORA ") -> (Tensor y, Tensor h)");
  m.def("lora_linear_dense(Tensor x, Tensor weight, " LOW_RANK ") -> (Tensor y, Tensor h)");
  m.def("lora_linear_hopper(Tensor x, " LORA ") -> (Tensor y, Tensor h)");
  m.def("dropout(Tensor x, float dropout_p, Tensor? seed) -> Tensor");
  m.def("dora_rescale(Tensor product, Tensor magnitude, Tensor norm, Tensor? bias) -> Tensor");
  m.def("dora_rescale_backward(Tensor grad, Tensor product, Tensor magnitude, Tensor norm) -> (Tensor dproduct, Tensor dmagnitude)");
  // A layer that the extension keeps for calls that name only x: the result is its address.
  m.def("prepare_nf4_linear(Tensor x, " NF4 ", int out_features, Tensor? bias) -> int");
  m.def("prepare_nf4_linear_hopper(Tensor x, " NF4 ", int out_features, Tensor? bias) -> int");
  m.def("prepare_lora_linear(Tensor x, " LORA ") -> int");
  m.def("prepare_lora_linear_dense(Tensor x, Tensor weight, " LOW_RANK ") -> int");
  m.def("prepare_dora_rescale(Tensor product, Tensor magnitude, Tensor norm, Tensor? bias) -> int");
  m.def("prepare_lora_linear_hopper(Tensor x, " LORA ") -> int");
  // For measurements alone: lora_linear with another plan than the rule's, and the rule's own.
  m.def("lora_linear_planned(Tensor x, " LORA ", int output_warps, int splits, int grid) -> (Tensor y, Tensor h)");
  m.def("lora_linear_hopper_planned(Tensor x, " LORA ", int tile_tokens, int splits, int grid) -> (Tensor y, Tensor h)");
  m.def("lora_linear_plan(Tensor x, int out_features) -> (int output_warps, int splits, int grid)");
  m.def("lora_linear_hopper_plan(Tensor x, int out_features) -> (int tile_tokens, int splits, int grid)");
  m.def("lora_extend(Tensor x, Tensor lora_A, Tensor? lora_A_bias, " LORA_OPTIONS ") -> (Tensor wide, Tensor h)");
  m.def("multi_lora_linear(Tensor x, " NF4 ", int out_features, " ADAPTERS ", Tensor? bias) -> (Tensor y, Tensor h)");
  m.def("multi_lora_add(Tensor x, " ADAPTERS ", Tensor(a!) y) -> Tensor");
  m.def("multi_lora_add_backward(Tensor grad, Tensor x, Tensor h, " ADAPTERS ", bool[] output_mask, Tensor(a!)? dx) -> (Tensor dlora_A, Tensor dlora_B)");
  m.def("lora_linear_backward(Tensor grad, Tensor x, Tensor h, " NF4 ", Tensor lora_A, Tensor lora_B, " LORA_OPTIONS ", bool[] output_mask) -> (Tensor dx, Tensor dweight, Tensor dlora_A, Tensor dlora_B, Tensor dbias, Tensor dlora_A_bias, Tensor dlora_B_bias)");
  m.def("bottleneck_adapter(Tensor x, Tensor? residual, " BOTTLENECK ") -> Tensor");
  m.def("bottleneck_adapter_into(Tensor x, Tensor? residual, " BOTTLENECK ", Tensor(a!) y) -> ()");
  m.def("bottleneck_adapter_backward(Tensor grad, Tensor x, bool adds_x, " BOTTLENECK ", bool[] output_mask) -> (Tensor dx, Tensor ddown_weight, Tensor ddown_bias, Tensor dup_weight, Tensor dup_bias, Tensor dnorm_before_weight, Tensor dnorm_before_bias, Tensor dnorm_after_weight, Tensor dnorm_after_bias)");
  m.def("bottleneck_adapter_backward_into(Tensor grad, Tensor x, bool adds_x, " BOTTLENECK ", bool[] output_mask, Tensor(a!) dx) -> (Tensor empty, Tensor ddown_weight, Tensor ddown_bias, Tensor dup_weight, Tensor dup_bias, Tensor dnorm_before_weight, Tensor dnorm_before_bias, Tensor dnorm_after_weight, Tensor dnorm_after_bias)");
}
// clang-format on

namespace pylora {

const char* source_digest();

}  // namespace pylora

namespace {

namespace py = pybind11;

// What the kernels cannot do at all, for Python's planners; that of cuda is the same in every build.
py::dict limits() {
  py::dict cpu, cuda, all;
  cpu["max_dense_m"] = pylora::cpu::kMaxDenseM;
  cpu["max_bottleneck"] = pylora::cpu::kMaxBottleneck;
  cpu["max_rank"] = pylora::cpu::kMaxRank;
  cuda["alignment"] = pylora::cuda::kAlignment;
  cuda["hopper_columns"] = pylora::cuda::kHopperColumns;
  cuda["many_rows_columns"] = pylora::cuda::kManyRowsColumns;
  cuda["max_elements"] = pylora::cuda::kMaxElements;
  cuda["max_small_m"] = pylora::cuda::kMaxSmallM;
  cuda["max_small_m_of_block_32"] = pylora::cuda::kMaxSmallMBlock32;
  cuda["max_m"] = pylora::cuda::kMaxM;
  cuda["max_rank"] = pylora::cuda::kMaxRank;
  all["cpu"] = cpu;
  all["cuda"] = cuda;
  return all;
}

py::dict build_info() {
  py::dict info;
  info["version"] = PYLORA_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["sources"] = pylora::source_digest();
  info["torch_target"] = PYLORA_TORCH_TARGET;
#if defined(PYLORA_CUDA_VERSION)
  info["cuda"] = true;
  info["cuda_version"] = PYLORA_CUDA_VERSION;
  info["cuda_archs"] = std::vector<std::string>{PYLORA_CUDA_ARCHS};
#else
  info["cuda"] = false;
  info["cuda_version"] = py::none();
  info["cuda_archs"] = std::vector<std::string>{};
#endif
  info["activations"] = std::vector<std::string>(std::begin(pylora::kActivationNames),
                                                 std::end(pylora::kActivationNames));
  info["norms"] = std::vector<std::string>(std::begin(pylora::cpu::kNormNames),
                                           std::end(pylora::cpu::kNormNames));
  info["limits"] = limits();
  return info;
}

}  // namespace

// Runs a prepared layer; the tensors of the call are given as addresses.
void run_prepared(const pylora::PreparedLayer& layer, intptr_t x, int64_t tokens, intptr_t y,
                  intptr_t h, double scaling, double dropout_p, intptr_t seed) {
  pylora::PreparedCall call;
  call.x = reinterpret_cast<const void*>(x);
  call.tokens = tokens;
  call.y = reinterpret_cast<void*>(y);
  call.h = reinterpret_cast<float*>(h);
  call.scaling = scaling;
  call.dropout_p = dropout_p;
  call.seed = reinterpret_cast<const int64_t*>(seed);
  layer.run(call);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of pylora: importing it registers torch.ops.pylora_C.*";
  m.def("build_info", &build_info, "How this extension was built.");
  m.def("cpu_features", &pylora::cpu::cpu_features,
        "Instruction set extensions found, of those known.");
  m.def("cpu_isas", &pylora::cpu::cpu_isas,
        "Instruction set levels this machine can run, lowest first.");
  m.def(
      "cpu_isa", [] { return pylora::cpu::cpu_isa_name(pylora::cpu::cpu_isa()); },
      "The level in use: the highest, or the one that PYLORA_CPU_ISA names.");
  m.def("set_cpu_isa", &pylora::cpu::set_cpu_isa, py::arg("name"),
        "Choose the level for this process; for tests and benchmarks.");
  m.def(
      "fingerprint",
      [](intptr_t address, int64_t bytes) {
        return pylora::fingerprint(reinterpret_cast<const void*>(address), bytes);
      },
      py::arg("address"), py::arg("bytes"),
      "A number that changes with the memory, for those who keep what they computed of it.");
  py::class_<pylora::PreparedLayer>(
      m, "PreparedLayer",
      "A layer whose tensors the extension keeps; torch.ops.pylora_C.prepare_* gives its address.")
      .def(py::init([](intptr_t address) {
             return std::unique_ptr<pylora::PreparedLayer>(
                 reinterpret_cast<pylora::PreparedLayer*>(address));
           }),
           py::arg("address"))
      .def("run", &run_prepared, py::arg("x"), py::arg("tokens"), py::arg("y"), py::arg("h") = 0,
           py::arg("scaling") = 1.0, py::arg("dropout_p") = 0.0, py::arg("seed") = 0,
           py::call_guard<py::gil_scoped_release>(),
           "Writes y, and h if its address is not 0. All tensors are given as addresses.");
}
