// GELU, z times the normal distribution's cumulative function at z, and its derivative, of a float or of a vector of floats.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastres {

enum { kNone, kRelu, kGelu };  // activations, as in passes.py

// exp(x) for x of at most 0, to 2e-7 of it: 2^n by its bits, and a Taylor series within half a binary order; 0 below the
// normal numbers. NaN stays.
template <class F, class I>
inline F exp_of(F x) {
  constexpr float kShift = 12582912.f;  // 1.5 * 2^23: a sum with it has no fraction, and the integer is in its lowest bits
  const F shifted = x * 1.44269504f + kShift;
  const F n = shifted - kShift;
  const F f = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log(2) in two parts, the first exact in few bits
  F p = F{} + 1.f / 720;
  for (const float c : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) p = p * f + c;
  I bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000;
  F power;
  std::memcpy(&power, &bits, sizeof power);
  const F value = p * power;
  return x < -87.f ? F{} : value;
}

template <class F>
struct Normal {
  F below, density;  // the cumulative function and the density
};

// By Abramowitz & Stegun 1964, 7.1.26, to 1e-7; as `normal` of the Triton kernels.
template <class F, class I>
inline Normal<F> normal(F z) {
  const F size = z < 0 ? -z : z;
  const F t = 1.f / (1.f + 0.23164190f * size);
  const F e = exp_of<F, I>(-0.5f * z * z);
  const F tail = ((((0.5307027f * t - 0.7265760f) * t + 0.7107069f) * t - 0.1422484f) * t + 0.1274148f) * t * e;
  return {z < 0 ? tail : 1.f - tail, 0.3989422804f * e};
}

template <class F, class I>
inline F gelu(F z) {
  return z * normal<F, I>(z).below;
}

// The derivative of GELU.
template <class F, class I>
inline F gelu_slope(F z) {
  const Normal<F> at = normal<F, I>(z);
  return at.below + z * at.density;
}

}  // namespace fastres
