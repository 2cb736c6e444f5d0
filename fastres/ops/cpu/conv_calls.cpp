// Calls of the convolutions: what becomes of their sums, and the functions that native.py knows.

#include <cmath>
#include <type_traits>

#include "conv.h"
#include "slots.h"

namespace fastres {
namespace {

template <class Function>
inline void with(bool flag, Function function) {
  flag ? function(std::true_type{}) : function(std::false_type{});
}

// Calls `function` with the number of vectors and of channels of a panel, constants where it is whole or one whole vector.
template <class Function>
inline void for_vectors(int64_t channels, Function function) {
  if (channels >= kColumns) {
    function(std::integral_constant<int64_t, 2>{}, std::integral_constant<int64_t, kColumns>{});
  } else if (channels == kLanes) {
    function(std::integral_constant<int64_t, 1>{}, std::integral_constant<int64_t, kLanes>{});
  } else {
    function(up(channels, kLanes), channels);
  }
}

// Reads a value of each line of pixels' channels from the `channel`-th.
inline void touch(const uint16_t* tensor, const int64_t* pixels, int64_t count, int64_t c, int64_t channel, int64_t channels) {
  if (!tensor) return;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t at = channel; at < channel + channels; at += kColumns) {
      const uint16_t value = tensor[pixels[i] * c + at];
      asm volatile("" ::"r"(value));
    }
}

// y = sums (+ residual), with the mean and the sum of squared deviations of each unit's columns, of what is stored. Both are
// taken from deviations from the unit's first pixel: those of a column of one value are 0, and a large mean does no harm.
struct Outputs : Epilogue {
  const uint16_t* residual;
  uint16_t* y;
  float *mean, *m2;
  int64_t c;

  void take(State& state, const float* sums, const int64_t* pixels, int64_t count, int64_t channel,
            int64_t channels) const override {
    with(residual != nullptr, [&](auto added) {
      with(mean != nullptr, [&](auto reduced) {
        for_vectors(channels, [&](auto vectors, auto lanes) {
          take<added, reduced>(state, sums, pixels, count, channel, vectors, lanes);
        });
      });
    });
  }

  void finish(const State& state, int64_t unit, int64_t channel, int64_t channels) const override {
    if (!mean) return;
    const Floats share = all(1.f / float(state.pixels));
    for (int64_t v = 0; v * kLanes < channels; ++v) {
      const int64_t at = unit * c + channel + v * kLanes, lanes = channels - v * kLanes;
      const Floats squares = state.second_sum[v] - state.sum[v] * state.sum[v] * share;
      store(mean + at, state.first[v] + state.sum[v] * share, lanes);
      store(m2 + at, squares <= 0 ? Floats{} : squares, lanes);  // rounding may leave less than 0; NaN stays
    }
  }

  void expect(const int64_t* pixels, int64_t count, int64_t channel, int64_t channels) const override {
    touch(residual, pixels, count, c, channel, channels);
  }

 private:
  template <bool kResidual, bool kMoments, class Vectors, class Channels>
  void take(State& state, const float* sums, const int64_t* pixels, int64_t count, int64_t channel, Vectors vectors,
            Channels channels) const {
    const uint16_t* const added = residual + channel;
    uint16_t* const to = y + channel;
    const int64_t pitch = c;
    Floats first[2] = {state.first[0], state.first[1]}, sum[2]{}, squares[2]{};  // a tile's sums of their own: less rounding
    for (int64_t i = 0; i < count; ++i, sums += kColumns) {
      const int64_t at = pixels[i] * pitch;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t lanes = channels - v * kLanes;
        Floats value = load(sums + v * kLanes, kLanes);
        if constexpr (kResidual) value += load(added + at + v * kLanes, lanes);
        value = store(to + at + v * kLanes, value, lanes);
        if constexpr (!kMoments) continue;
        if (i == 0 && state.pixels == 0) first[v] = value;
        const Floats away = value - first[v];
        sum[v] += away;
        squares[v] += away * away;
      }
    }
    if constexpr (!kMoments) return;
    for (int64_t v = 0; v < 2; ++v) state.first[v] = first[v], state.sum[v] += sum[v], state.second_sum[v] += squares[v];
    state.pixels += count;
  }
};

// relu(sums + bias (+ residual)).
struct Folded : Epilogue {
  Finished all;

  const Finished* finished() const override { return &all; }

  void take(State&, const float* sums, const int64_t* pixels, int64_t count, int64_t channel, int64_t channels) const override {
    with(all.added != nullptr, [&](auto added) {
      with(all.rectified, [&](auto rectified) {
        for_vectors(channels, [&](auto vectors, auto lanes) {
          take<added, rectified>(sums, pixels, count, channel, vectors, lanes);
        });
      });
    });
  }

 private:
  template <bool kResidual, bool kRelu, class Vectors, class Channels>
  void take(const float* sums, const int64_t* pixels, int64_t count, int64_t channel, Vectors vectors, Channels channels) const {
    const uint16_t* const added = all.added + channel;
    uint16_t* const to = all.to + channel;
    const int64_t pitch = all.pitch;
    Floats constant[2]{};
    for (int64_t v = 0; v < vectors; ++v) constant[v] = load(all.bias + channel + v * kLanes, channels - v * kLanes);
    for (int64_t i = 0; i < count; ++i, sums += kColumns) {
      const int64_t at = pixels[i] * pitch;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t lanes = channels - v * kLanes;
        Floats value = load(sums + v * kLanes, kLanes) + constant[v];
        if constexpr (kResidual) value += load(added + at + v * kLanes, lanes);
        store(to + at + v * kLanes, kRelu ? relu(value) : value, lanes);
      }
    }
  }
};

// dz = (sums + residual) where the ReLU of mask * scale + shift, or mask itself, let something through, or times the slope of
// GELU there; with the sums over each unit of dz and of dz * xhat of the BatchNorm whose input is y.
struct Gradient : Epilogue {
  const uint16_t *residual, *mask, *y;
  const float *scale, *shift, *mean, *rstd;  // the first two of the mask; null: it is the ReLU's output
  bool with_gelu;                            // with a scale
  uint16_t* dz;
  float* sums_of_units;  // [units, 2, c]
  int64_t c;

  void take(State& state, const float* sums, const int64_t* pixels, int64_t count, int64_t channel,
            int64_t channels) const override {
    with(residual != nullptr, [&](auto added) {
      const auto run = [&](auto kind, auto reduced) {
        for_vectors(channels, [&](auto vectors, auto lanes) {
          take<added, kind, reduced>(state, sums, pixels, count, channel, vectors, lanes);
        });
      };
      const auto masked = [&](auto reduced) {
        if (!mask) {
          run(std::integral_constant<int, 0>{}, reduced);
        } else if (!scale) {
          run(std::integral_constant<int, 1>{}, reduced);
        } else if (with_gelu) {
          run(std::integral_constant<int, 4>{}, reduced);
        } else if (y != mask) {
          run(std::integral_constant<int, 2>{}, reduced);
        } else {
          run(std::integral_constant<int, 3>{}, reduced);
        }
      };
      with(y != nullptr, masked);
    });
  }

  void finish(const State& state, int64_t unit, int64_t channel, int64_t channels) const override {
    if (!y) return;
    for (int64_t v = 0; v * kLanes < channels; ++v) {
      const int64_t at = channel + v * kLanes, lanes = channels - v * kLanes;
      store(sums_of_units + unit * 2 * c + at, state.sum[v], lanes);
      store(sums_of_units + (unit * 2 + 1) * c + at, state.second_sum[v] * load(rstd + at, lanes), lanes);
    }
  }

  void expect(const int64_t* pixels, int64_t count, int64_t channel, int64_t channels) const override {
    touch(residual, pixels, count, c, channel, channels);
    touch(mask, pixels, count, c, channel, channels);
    if (y != mask) touch(y, pixels, count, c, channel, channels);
  }

 private:
  // kMask: 0 none, 1 the mask, 2 the mask with coefficients, 3 that, which is y too, 4 GELU of that of 2
  template <bool kResidual, int kMask, bool kSums, class Vectors, class Channels>
  void take(State& state, const float* sums, const int64_t* pixels, int64_t count, int64_t channel, Vectors vectors,
            Channels channels) const {
    const uint16_t *const added = residual + channel, *const of_mask = mask + channel, *const of_y = y + channel;
    uint16_t* const to = dz + channel;
    const int64_t pitch = c;
    Floats factor[2]{}, constant[2]{}, middle[2]{}, sum[2]{}, scaled[2]{};
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = channel + v * kLanes, lanes = channels - v * kLanes;
      if constexpr (kMask > 1) factor[v] = load(scale + at, lanes), constant[v] = load(shift + at, lanes);
      if constexpr (kSums) middle[v] = load(mean + at, lanes);
    }
    for (int64_t i = 0; i < count; ++i, sums += kColumns) {
      const int64_t pixel = pixels[i] * pitch;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t at = pixel + v * kLanes, lanes = channels - v * kLanes;
        Floats value = load(sums + v * kLanes, kLanes), x{};
        if constexpr (kResidual) value += load(added + at, lanes);
        if constexpr (kMask > 0) x = load(of_mask + at, lanes);
        if constexpr (kMask == 1) value = x <= 0 ? Floats{} : value;
        if constexpr (kMask == 2 || kMask == 3) value = x * factor[v] + constant[v] <= 0 ? Floats{} : value;
        if constexpr (kMask == 4) value *= gelu_slope(x * factor[v] + constant[v]);
        value = store(to + at, value, lanes);
        if constexpr (!kSums) continue;
        if constexpr (kMask != 3) x = load(of_y + at, lanes);
        sum[v] += value;
        scaled[v] += value * (x - middle[v]);
      }
    }
    if constexpr (!kSums) return;
    for (int64_t v = 0; v < 2; ++v) state.sum[v] += sum[v], state.second_sum[v] += scaled[v];
  }
};

Shape shape_of(const int64_t* sizes) {
  Shape shape;
  std::memcpy(&shape, sizes, sizeof shape);
  return shape;
}

// dy = A * dz + B * y + C with abc [3, K], or A * dz without y, or dz without both.
Source gradient_source(const uint16_t* dz, const uint16_t* y, const float* abc, int64_t k) {
  if (!abc) return {Prologue::kPlain, dz, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  return {Prologue::kGrad, dz, y, abc, abc + 2 * k, abc + k, nullptr, nullptr};
}

}  // namespace
}  // namespace fastres

using namespace fastres;

// The best form of tiles on this CPU: 0 plain, 1 AVX512-BF16, 2 AMX.
extern "C" int64_t fastres_form() { return best_form(); }

extern "C" int64_t fastres_few_channels() { return kFewChannels; }

extern "C" int64_t fastres_units(int64_t form, const int64_t* sizes, bool transposed) {
  return units(Form(form), shape_of(sizes), transposed);
}

extern "C" void fastres_unit_pixels(int64_t form, const int64_t* sizes, bool transposed, float* pixels) {
  unit_pixels(Form(form), shape_of(sizes), transposed, pixels);
}

extern "C" int64_t fastres_packed_size(int64_t form, const int64_t* sizes, bool transposed) {
  return packed_size(Form(form), shape_of(sizes), transposed);
}

// w in fp32, which is rounded, or in bf16.
extern "C" void fastres_pack(int64_t form, const int64_t* sizes, bool transposed, const void* w, bool single, uint16_t* packed,
                             int64_t threads) {
  if (single) {
    pack(Form(form), shape_of(sizes), transposed, static_cast<const float*>(w), packed, threads);
  } else {
    pack(Form(form), shape_of(sizes), transposed, static_cast<const uint16_t*>(w), packed, threads);
  }
}

// y [N, OH, OW, K] of x [N, H, W, C], or of relu(x * scale + shift) with coef [5, C], gelu in its place, or of relu with a
// shortcut inside, which is then stored in `out`.
extern "C" void fastres_conv(int64_t form, const int64_t* sizes, const uint16_t* x, const float* coef, bool gelu,
                             const uint16_t* shortcut, const float* shortcut_coef, uint16_t* out, const uint16_t* weights, const uint16_t* residual,
                             uint16_t* y, float* mean, float* m2, int64_t threads) {
  const Shape s = shape_of(sizes);
  Source source{Prologue::kPlain, x, shortcut, nullptr, nullptr, nullptr, nullptr, out};
  if (coef) source.prologue = shortcut || out ? Prologue::kJoin : gelu ? Prologue::kGelu : Prologue::kNorm;
  if (coef) source.scale = coef + 3 * s.in_channels, source.shift = coef + 4 * s.in_channels;
  if (shortcut_coef) {
    source.second_scale = shortcut_coef + 3 * s.in_channels, source.second_shift = shortcut_coef + 4 * s.in_channels;
  }
  Outputs outputs;
  outputs.residual = residual, outputs.y = y, outputs.mean = mean, outputs.m2 = m2, outputs.c = s.out_channels;
  multiply(Form(form), s, false, source, weights, outputs, threads);
}

// relu(conv(x) + bias (+ residual)).
extern "C" void fastres_folded_conv(int64_t form, const int64_t* sizes, const uint16_t* x, const uint16_t* weights,
                                    const float* bias, const uint16_t* residual, bool relu, uint16_t* y, int64_t threads) {
  const Shape s = shape_of(sizes);
  Folded folded;
  folded.all = {bias, residual, y, s.out_channels, relu};
  multiply(Form(form), s, false, Source{Prologue::kPlain, x, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr}, weights,
           folded, threads);
}

// The gradient at x of dy = A * dz + B * y + C with abc [3, K], or A * dz, or dz; see Gradient.
extern "C" void fastres_data_grad(int64_t form, const int64_t* sizes, const uint16_t* dz, const uint16_t* y, const float* abc,
                                  const uint16_t* weights, const uint16_t* residual, const uint16_t* mask,
                                  const float* mask_coef, bool gelu, const uint16_t* below, const float* below_coef, uint16_t* dx,
                                  float* sums, int64_t threads) {
  const Shape s = shape_of(sizes);
  const int64_t c = s.in_channels;
  Gradient gradient;
  gradient.residual = residual, gradient.mask = mask, gradient.y = below, gradient.dz = dx, gradient.sums_of_units = sums;
  gradient.scale = mask_coef ? mask_coef + 3 * c : nullptr, gradient.shift = mask_coef ? mask_coef + 4 * c : nullptr;
  gradient.with_gelu = gelu;
  gradient.mean = below_coef, gradient.rstd = below_coef ? below_coef + 2 * c : nullptr, gradient.c = c;
  multiply(Form(form), s, true, gradient_source(dz, y, abc, s.out_channels), weights, gradient, threads);
}

// The weight gradient of the same, dw [K, KH, KW, C], of x or of relu(x * scale + shift) with coef [5, C], gelu in its
// place.
extern "C" void fastres_weight_grad(int64_t form, const int64_t* sizes, const uint16_t* dz, const uint16_t* y, const float* abc,
                                    const uint16_t* x, const float* coef, bool gelu, float* dw, int64_t threads) {
  const Shape s = shape_of(sizes);
  Source source{Prologue::kPlain, x, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  if (coef) source.prologue = gelu ? Prologue::kGelu : Prologue::kNorm;
  if (coef) source.scale = coef + 3 * s.in_channels, source.shift = coef + 4 * s.in_channels;
  weight_grad(Form(form), s, source, gradient_source(dz, y, abc, s.out_channels), dw, threads);
}

FASTRES_SLOTS(unit_pixels)
FASTRES_SLOTS(pack)
FASTRES_SLOTS(conv)
FASTRES_SLOTS(folded_conv)
FASTRES_SLOTS(data_grad)
FASTRES_SLOTS(weight_grad)
