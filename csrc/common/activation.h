// The activations between the two projections of an adapter, and their derivatives. They are fp64:
// a bias gradient sums derivatives over all tokens, so their errors would add up, and there are so
// few of them that fp64 costs nothing.
#pragma once

#include <cmath>
#include <cstdint>

namespace pylora {

// The ops take an activation as its number in this list.
enum class Activation { kIdentity, kRelu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid };
inline constexpr int kActivations = 7;
inline constexpr const char* kActivationNames[kActivations] = {
    "identity", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"};

inline double sigmoid(double h) { return 1.0 / (1.0 + std::exp(-h)); }

// The tanh approximation of GELU (Hendrycks and Gimpel, arXiv:1606.08415) takes tanh(kGeluScale *
// (h + kGeluCubic * h^3)).
inline constexpr double kGeluScale = 0.7978845608028654;  // sqrt(2 / pi)
inline constexpr double kGeluCubic = 0.044715;

inline double activate(Activation activation, double h) {
  switch (activation) {
    case Activation::kIdentity:
      return h;
    case Activation::kRelu:
      return h > 0.0 || h != h ? h : 0.0;
    case Activation::kGelu:
      return 0.5 * h * (1.0 + std::erf(h * 0.7071067811865476));
    case Activation::kGeluTanh:
      return 0.5 * h * (1.0 + std::tanh(kGeluScale * (h + kGeluCubic * h * h * h)));
    case Activation::kSilu:
      return h * sigmoid(h);
    case Activation::kTanh:
      return std::tanh(h);
    case Activation::kSigmoid:
      return sigmoid(h);
  }
  return h;
}

// The derivative of activate(h).
inline double activation_slope(Activation activation, double h) {
  switch (activation) {
    case Activation::kIdentity:
      return 1.0;
    case Activation::kRelu:
      return h > 0.0 ? 1.0 : 0.0;
    case Activation::kGelu: {
      const double density = 0.3989422804014327 * std::exp(-0.5 * h * h);
      return 0.5 * (1.0 + std::erf(h * 0.7071067811865476)) + h * density;
    }
    case Activation::kGeluTanh: {
      const double t = std::tanh(kGeluScale * (h + kGeluCubic * h * h * h));
      const double inner = kGeluScale * (1.0 + 3.0 * kGeluCubic * h * h);
      return 0.5 * (1.0 + t) + 0.5 * h * (1.0 - t * t) * inner;
    }
    case Activation::kSilu: {
      const double s = sigmoid(h);
      return s * (1.0 + h * (1.0 - s));
    }
    case Activation::kTanh: {
      const double t = std::tanh(h);
      return 1.0 - t * t;
    }
    case Activation::kSigmoid: {
      const double s = sigmoid(h);
      return s * (1.0 - s);
    }
  }
  return 1.0;
}

}  // namespace pylora
