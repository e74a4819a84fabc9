// The activations between the two projections of an adapter, and their derivatives, in fp32.
#pragma once

#include <cmath>
#include <cstdint>

namespace pylora {

enum class Activation { kIdentity, kRelu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid };

inline float sigmoid(float h) { return 1.0f / (1.0f + std::exp(-h)); }

// tanh's argument in the approximation of GELU (Hendrycks and Gimpel, arXiv:1606.08415).
inline constexpr float kGeluScale = 0.7978845608028654f;  // sqrt(2 / pi)
inline constexpr float kGeluCubic = 0.044715f;

inline float activate(Activation activation, float h) {
  switch (activation) {
    case Activation::kIdentity:
      return h;
    case Activation::kRelu:
      return h > 0.0f || h != h ? h : 0.0f;
    case Activation::kGelu:
      return 0.5f * h * (1.0f + std::erf(h * 0.7071067811865476f));
    case Activation::kGeluTanh:
      return 0.5f * h * (1.0f + std::tanh(kGeluScale * (h + kGeluCubic * h * h * h)));
    case Activation::kSilu:
      return h * sigmoid(h);
    case Activation::kTanh:
      return std::tanh(h);
    case Activation::kSigmoid:
      return sigmoid(h);
  }
  return h;
}

// d activate(h) / dh.
inline float activation_slope(Activation activation, float h) {
  switch (activation) {
    case Activation::kIdentity:
      return 1.0f;
    case Activation::kRelu:
      return h > 0.0f ? 1.0f : 0.0f;
    case Activation::kGelu: {
      const float density = 0.3989422804014327f * std::exp(-0.5f * h * h);
      return 0.5f * (1.0f + std::erf(h * 0.7071067811865476f)) + h * density;
    }
    case Activation::kGeluTanh: {
      const float t = std::tanh(kGeluScale * (h + kGeluCubic * h * h * h));
      const float inner = kGeluScale * (1.0f + 3.0f * kGeluCubic * h * h);
      return 0.5f * (1.0f + t) + 0.5f * h * (1.0f - t * t) * inner;
    }
    case Activation::kSilu: {
      const float s = sigmoid(h);
      return s * (1.0f + h * (1.0f - s));
    }
    case Activation::kTanh: {
      const float t = std::tanh(h);
      return 1.0f - t * t;
    }
    case Activation::kSigmoid: {
      const float s = sigmoid(h);
      return s * (1.0f - s);
    }
  }
  return 1.0f;
}

}  // namespace pylora
