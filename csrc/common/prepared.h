// A layer that is called again and again with the same tensors. The extension keeps them, so that a
// call names only its input and its results: reading 18 arguments in torch's dispatcher costs more
// than a small kernel. Each call runs the checks of the op it stands for on the tensors as they are
// then: torch may have given them other memory in the meantime.
#pragma once

#include <cstdint>
#include <tuple>
#include <utility>

#include "common/tensors.h"

namespace pylora {

class PreparedLayer {
 public:
  virtual ~PreparedLayer() = default;
  virtual void run(const PreparedCall& call) const = 0;
};

template <auto kRun>
struct Prepared;

// Runs kRun(x, call, tensors...), where x is the input as a matrix.
template <class... Kept, void (*kRun)(Tokens&, const PreparedCall&, Kept&...)>
struct Prepared<kRun> {
  class Layer : public PreparedLayer {
   public:
    // `like` has x's dtype, device and number of columns.
    Layer(const Tensor& like, const Kept&... kept)
        : like_(torch::stable::new_empty(like, {0, Tokens("x", like).cols})), kept_(kept...) {}

    void run(const PreparedCall& call) const override {
      Tokens x("x", like_, call.x, call.tokens, like_.size(1));
      auto kept = kept_;  // a check replaces what is not contiguous, for this call alone
      std::apply([&](Kept&... tensors) { kRun(x, call, tensors...); }, kept);
    }

   private:
    Tensor like_;
    std::tuple<Kept...> kept_;
  };

  // The address of a new layer, which belongs to the caller: pylora._C.PreparedLayer takes it.
  static int64_t make(const Tensor& like, Kept&... kept) {
    const PreparedLayer* layer = new Layer(like, kept...);
    return static_cast<int64_t>(reinterpret_cast<intptr_t>(layer));
  }
};

}  // namespace pylora
