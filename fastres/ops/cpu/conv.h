// A convolution, or its data gradient, as products of tiles: what is read, what is multiplied, what becomes of the sums.
//
// Work is cut into units: images, or rows of one, whose input fits a core's second-level cache. A unit's input is packed once,
// made on the way of what the layer before left (normalised and rectified; the gradient in front of a BatchNorm), with zeros
// where padding is, so that a tap is nothing but an offset. Then each panel of 32 output channels is multiplied and its sums
// are finished while they are in registers' reach: added to, masked, rounded, reduced. Units do not depend on the number of
// threads, and neither do results.
#pragma once

#include <vector>

#include "tiles.h"

namespace fastres {

// As in `integers` of native.py.
struct Shape {
  int64_t n, in_height, in_width, in_channels, out_height, out_width, out_channels;
  int64_t kernel_h, kernel_w, stride, top, left, dilation;

  bool is_pointwise() const { return kernel_h == 1 && kernel_w == 1 && top == 0 && left == 0; }
};

// What is packed, each channel: x, relu(x * scale + shift), gelu of that, relu with another tensor added inside, or
// scale * x + second scale * second + shift; the fourth is also stored in `copy`.
enum class Prologue { kPlain, kNorm, kGelu, kJoin, kGrad };

struct Source {
  Prologue prologue;
  const uint16_t *x, *second;
  const float *scale, *shift, *second_scale, *second_shift;
  uint16_t* copy;
};

// What 16 channels are multiplied by and what is added.
struct Factors {
  Floats scale, shift, second_scale, second_shift;
};

template <Prologue kPrologue>
inline Factors factors_of(const Source& s, int64_t channel, int64_t count) {
  Factors f{};
  if constexpr (kPrologue == Prologue::kPlain) return f;
  f.scale = load(s.scale + channel, count);
  if (s.shift) f.shift = load(s.shift + channel, count);
  if (s.second_scale) f.second_scale = load(s.second_scale + channel, count);
  if (s.second_shift) f.second_shift = load(s.second_shift + channel, count);
  return f;
}

template <Prologue kPrologue>
inline Floats value_of(const Source& s, int64_t at, const Factors& f, int64_t count) {
  const Floats x = load(s.x + at, count);
  if constexpr (kPrologue == Prologue::kPlain) return x;
  if constexpr (kPrologue == Prologue::kNorm) return relu(x * f.scale + f.shift);
  if constexpr (kPrologue == Prologue::kGelu) return gelu(x * f.scale + f.shift);
  if constexpr (kPrologue == Prologue::kJoin) {
    Floats added{};
    if (s.second) added = load(s.second + at, count);
    if (s.second_scale) added = added * f.second_scale + f.second_shift;
    return relu(x * f.scale + f.shift + added);
  }
  if (!s.second) return x * f.scale;
  return x * f.scale + (load(s.second + at, count) * f.second_scale + f.shift);
}

template <Prologue kPrologue>
inline Floats value_of(const Source& s, int64_t at, int64_t channel, int64_t count) {
  return value_of<kPrologue>(s, at, factors_of<kPrologue>(s, channel, count), count);
}

// Fetches what will be read soon, in values from the `at`-th on; the processor alone follows few tensors at once.
inline void fetch(const Source& s, int64_t at) {
  constexpr int64_t kAhead = 1024;
  __builtin_prefetch(s.x + at + kAhead);
  if (s.second) __builtin_prefetch(s.second + at + kAhead);
}

// What becomes of sums.
struct State {  // of a panel in a unit: of each vector of channels its first values and two sums
  Floats first[2], sum[2], second_sum[2];
  int64_t pixels;
};

class Epilogue {
 public:
  virtual ~Epilogue() = default;
  // `count` rows of sums of these output pixels, in `channels` channels from the `channel`-th.
  virtual void take(State& state, const float* sums, const int64_t* pixels, int64_t count, int64_t channel,
                    int64_t channels) const = 0;
  // Such outputs come next: what `take` reads for them is brought into the cache line after line, as memory gives it fastest.
  virtual void expect(const int64_t* /*pixels*/, int64_t /*count*/, int64_t /*channel*/, int64_t /*channels*/) const {}
  // What is made of sums where that needs no others, from the first pixel and channel on; null: `take` is called.
  virtual const Finished* finished() const { return nullptr; }
  // After all of a unit's pixels.
  virtual void finish(const State&, int64_t /*unit*/, int64_t /*channel*/, int64_t /*channels*/) const {}
};

// Outputs of a convolution's products with packed weights [panels][taps][pairs][32][2]; `transposed`: of its data gradient,
// whose input is like the convolution's output, and output like its input.
void multiply(Form form, const Shape& shape, bool transposed, const Source& source, const uint16_t* weights,
              const Epilogue& epilogue, int64_t threads);

// Units of such products.
int64_t units(Form form, const Shape& shape, bool transposed);
// Pixels of each.
void unit_pixels(Form form, const Shape& shape, bool transposed, float* pixels);

int64_t packed_size(Form form, const Shape& shape, bool transposed);  // in bf16 values
// w [K, KH, KW, C], in bf16 or fp32, as such products take it.
template <class Value>
void pack(Form form, const Shape& shape, bool transposed, const Value* w, uint16_t* packed, int64_t threads);

// The weight gradient dw [K, KH, KW, C] in fp32 of what is made of x and of what is made of the gradient at the output, see
// weight_grad.cpp.
void weight_grad(Form form, const Shape& shape, const Source& x, const Source& dy, float* dw, int64_t threads);

// The same of an input of few channels, where it has so few and the CPU has vectors for it, see few_channels.cpp.
constexpr int64_t kFewChannels = 9;
bool has_few_channels(Form form, const Shape& shape, const Source& x);
void weight_grad_of_few(const Shape& shape, const Source& x, const Source& dy, float* dw, int64_t threads);

}  // namespace fastres
