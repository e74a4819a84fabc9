// Registers a function of this extension as the kernel of an op. Torch's stable ABI hands over the
// arguments boxed, in the order of the op's schema. A parameter that is a struct with `Fields`, such
// as NF4Tensors, takes as many of them as it has fields, so that a schema and its functions spell a
// weight's seven arguments once.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

namespace pylora {

template <class T>
concept HasFields = requires { typename T::Fields; };

// How many arguments a parameter takes.
template <class T>
struct Arguments {
  static constexpr uint64_t kCount = 1;
};

template <class... T>
struct Arguments<std::tuple<T...>> {
  static constexpr uint64_t kCount = (uint64_t{0} + ... + Arguments<T>::kCount);
};

template <HasFields T>
struct Arguments<T> : Arguments<typename T::Fields> {};

// Reads the arguments from left to right. What has been read belongs to the reader's caller.
class ArgumentReader {
 public:
  explicit ArgumentReader(const StableIValue* stack) : next_(stack) {}

  template <class T>
  T read() {
    if constexpr (HasFields<T>) {
      using Fields = typename T::Fields;
      return read_fields<T, Fields>(std::make_index_sequence<std::tuple_size_v<Fields>>());
    } else {
      return torch::stable::detail::to<T>(*next_++);
    }
  }

 private:
  // Braces evaluate their values from left to right.
  template <class T, class Fields, size_t... kIndex>
  T read_fields(std::index_sequence<kIndex...>) {
    return T{read<std::tuple_element_t<kIndex, Fields>>()...};
  }

  const StableIValue* next_;
};

// What a function returns, as the list of an op's results.
template <class Result>
struct Results {
  static constexpr uint64_t kCount = 1;
  static void write(StableIValue* stack, const Result& result) {
    stack[0] = torch::stable::detail::from(result);
  }
};

template <class... Result>
struct Results<std::tuple<Result...>> {
  static constexpr uint64_t kCount = sizeof...(Result);
  static void write(StableIValue* stack, const std::tuple<Result...>& results) {
    std::apply(
        [stack](const Result&... result) {
          StableIValue* next = stack;
          ((*next++ = torch::stable::detail::from(result)), ...);
        },
        results);
  }
};

template <auto kRun>
struct Boxed;

template <class Result, class... Parameter, Result (*kRun)(Parameter...)>
struct Boxed<kRun> {
  using Values = std::tuple<std::remove_cvref_t<Parameter>...>;

  static void run(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
    STD_TORCH_CHECK(num_arguments == Arguments<Values>::kCount, "the schema has ", num_arguments,
                    " arguments, but the kernel takes ", Arguments<Values>::kCount);
    STD_TORCH_CHECK(num_results == count_results(), "the schema has ", num_results,
                    " results, but the kernel gives ", count_results());
    // All are read before the function can throw: those left on the stack would never be freed.
    ArgumentReader reader(stack);
    Values values{reader.read<std::remove_cvref_t<Parameter>>()...};
    if constexpr (std::is_void_v<Result>) {
      std::apply(kRun, values);
    } else {
      Results<Result>::write(stack, std::apply(kRun, values));
    }
  }

 private:
  static constexpr uint64_t count_results() {
    if constexpr (std::is_void_v<Result>) {
      return 0;
    } else {
      return Results<Result>::kCount;
    }
  }
};

// For the op's registration: m.impl("nf4_linear", boxed<nf4_linear>).
template <auto kRun>
inline constexpr auto boxed = &Boxed<kRun>::run;

}  // namespace pylora
