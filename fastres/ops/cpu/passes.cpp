// The passes of the fused schedules over activations in memory, for CPUs: normalise, statistics, BatchNorm backward.
//
// Activations are NHWC, [M, C] with M = N*H*W, in fp32 or bf16; arithmetic and statistics are fp32. Work is split into
// blocks of rows, small enough to stay in a core's cache while they are read twice; each block leaves its own partial
// sums, so results do not depend on the number of threads. The loops over channels are the vectorised ones. NaN goes
// through ReLU, as in PyTorch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "gelu.h"
#include "slots.h"
#include "window.h"

namespace {

using fastres::kGelu;
using fastres::kNone;
using fastres::kRelu;
using fastres::Window;
using fastres::window_of;

struct bf16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void store(float* p, float value) { *p = value; }
inline void store(bf16* p, float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

template <typename T>
inline float rounded(float value) {
  T stored;
  store(&stored, value);
  return load(stored);
}

inline float relu(float value) { return value <= 0 ? 0 : value; }
inline float gelu_slope(float value) { return fastres::gelu_slope<float, uint32_t>(value); }

template <int kAct>
inline float activated(float value) {
  if constexpr (kAct == kRelu) return relu(value);
  if constexpr (kAct == kGelu) return fastres::gelu<float, uint32_t>(value);
  return value;
}

struct Rows {
  int64_t first, last;
};

inline Rows rows_of(int64_t block, int64_t rows, int64_t m) {
  return {block * rows, std::min(m, (block + 1) * rows)};
}

inline int64_t blocks_of(int64_t m, int64_t rows) { return (m + rows - 1) / rows; }

// out = x + residual, out = x (a copy), or nothing where out is x; with the mean and the sum of squared deviations of
// each block's columns, of what is stored. The mean is the first row and the mean deviation from it: that of a column of
// one value is that value, as xhat would be rounding errors times 1/sqrt(eps) otherwise.
template <typename T, bool kCopy, bool kResidual>
void moments(const T* x, const T* residual, T* out, int64_t m, int64_t c, int64_t rows, float* mean, float* m2,
             int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t block = 0; block < blocks_of(m, rows); ++block) {
    const Rows range = rows_of(block, rows, m);
    float* block_mean = mean + block * c;
    float* block_m2 = m2 + block * c;
    float* first_row = block_m2;  // until that is needed
    std::fill(block_mean, block_mean + c, 0.f);
    for (int64_t row = range.first; row < range.last; ++row) {
      const T* in = x + row * c;
      const T* added = residual + row * c;
      T* to = out + row * c;
      const bool is_first = row == range.first;
#pragma omp simd
      for (int64_t i = 0; i < c; ++i) {
        float value = load(in[i]);
        if constexpr (kResidual) value = rounded<T>(value + load(added[i]));
        if constexpr (kCopy) store(to + i, value);
        first_row[i] = is_first ? value : first_row[i];
        block_mean[i] += value - first_row[i];
      }
    }
    const float share = 1.f / float(range.last - range.first);
#pragma omp simd
    for (int64_t i = 0; i < c; ++i) {
      block_mean[i] = first_row[i] + block_mean[i] * share;
      block_m2[i] = 0;
    }
    const T* stored = kCopy ? out : x;
    for (int64_t row = range.first; row < range.last; ++row) {
      const T* in = stored + row * c;
#pragma omp simd
      for (int64_t i = 0; i < c; ++i) {
        const float deviation = load(in[i]) - block_mean[i];
        block_m2[i] += deviation * deviation;
      }
    }
  }
}

// act(y * scale + shift + shortcut), the shortcut normalised where it has coefficients: kShortcut 0 none, 1 plain, 2 so.
template <typename T, int kShortcut, int kAct>
void normalise(const T* y, const float* scale, const float* shift, const T* shortcut, const float* shortcut_scale,
               const float* shortcut_shift, T* out, int64_t m, int64_t c, int64_t rows, int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t block = 0; block < blocks_of(m, rows); ++block) {
    const Rows range = rows_of(block, rows, m);
    for (int64_t row = range.first; row < range.last; ++row) {
      const T* in = y + row * c;
      const T* added = shortcut + row * c;
      T* to = out + row * c;
#pragma omp simd
      for (int64_t i = 0; i < c; ++i) {
        float value = load(in[i]) * scale[i] + shift[i];
        if constexpr (kShortcut == 1) value += load(added[i]);
        if constexpr (kShortcut == 2) value += load(added[i]) * shortcut_scale[i] + shortcut_shift[i];
        store(to + i, activated<kAct>(value));
      }
    }
  }
}

// dz = (dout + residual) where the ReLU let something through, with the sums over each block of dz and of dz * xhat, for
// one BatchNorm or for two. The ReLU's output is ref (kMask 1), or of ref * scale + shift (kMask 2), or there is no ReLU;
// or it is GELU of that (kMask 3), of that with a shortcut added (kMask 4), or with the second BatchNorm's result (kMask 5).
template <typename T, bool kResidual, int kMask, bool kStore, int kNorms>
void backward_sums(const T* dout, const T* residual, const T* ref, const float* scale, const float* shift,
                   const T* shortcut, const T* const* y, const float* const* coef, T* dz, float* const* sums, int64_t m, int64_t c,
                   int64_t rows, int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t block = 0; block < blocks_of(m, rows); ++block) {
    const Rows range = rows_of(block, rows, m);
    for (int norm = 0; norm < kNorms; ++norm) {
      float* to = sums[norm] + block * 2 * c;
      std::fill(to, to + 2 * c, 0.f);
    }
    const float* mean = coef[0];
    const float* second_mean = kNorms > 1 ? coef[1] : nullptr;
    const float* second_scale = kNorms > 1 ? coef[1] + 3 * c : nullptr;
    const float* second_shift = kNorms > 1 ? coef[1] + 4 * c : nullptr;
    float* plain = sums[0] + block * 2 * c;
    float* scaled = plain + c;
    float* second_scaled = kNorms > 1 ? sums[1] + block * 2 * c + c : nullptr;
    for (int64_t row = range.first; row < range.last; ++row) {
      const int64_t start = row * c;
      const T* from = dout + start;
      const T* added = residual + start;
      const T* mask = ref + start;
      const T* opened = shortcut + start;
      const T* first_y = y[0] + start;
      const T* second_y = kNorms > 1 ? y[1] + start : nullptr;
      T* to = dz + start;
#pragma omp simd
      for (int64_t i = 0; i < c; ++i) {
        float grad = load(from[i]);
        if constexpr (kResidual) grad = rounded<T>(grad + load(added[i]));
        if constexpr (kMask == 1) grad = load(mask[i]) <= 0 ? 0 : grad;
        if constexpr (kMask == 2) grad = load(mask[i]) * scale[i] + shift[i] <= 0 ? 0 : grad;
        if constexpr (kMask > 2) {
          float z = load(mask[i]) * scale[i] + shift[i];
          if constexpr (kMask == 4) z += load(opened[i]);
          if constexpr (kMask == 5) z += load(second_y[i]) * second_scale[i] + second_shift[i];
          grad = rounded<T>(grad * gelu_slope(z));
        }
        if constexpr (kStore) store(to + i, grad);
        plain[i] += grad;
        scaled[i] += grad * (load(first_y[i]) - mean[i]);
        if constexpr (kNorms > 1) second_scaled[i] += grad * (load(second_y[i]) - second_mean[i]);
      }
    }
    for (int norm = 0; norm < kNorms; ++norm) {
      const float* rstd = coef[norm] + 2 * c;
      float* to = sums[norm] + block * 2 * c;
#pragma omp simd
      for (int64_t i = 0; i < c; ++i) to[c + i] *= rstd[i];
      if (norm > 0) std::copy(plain, plain + c, to);
    }
  }
}

// A * dz + B * y + C (+ residual), or, where the statistics are constants, A * dz (+ residual)
template <typename T, bool kTrained, bool kResidual>
void backward_apply(const T* dz, const T* y, const float* abc, const T* residual, T* out, int64_t m, int64_t c,
                    int64_t rows, int64_t threads) {
  const float* a = abc;
  const float* b = abc + c;
  const float* constant = abc + 2 * c;
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t block = 0; block < blocks_of(m, rows); ++block) {
    const Rows range = rows_of(block, rows, m);
    for (int64_t row = range.first; row < range.last; ++row) {
      const T* grad = dz + row * c;
      const T* in = y + row * c;
      const T* added = residual + row * c;
      T* to = out + row * c;
#pragma omp simd
      for (int64_t i = 0; i < c; ++i) {
        float value = a[i] * load(grad[i]);
        if constexpr (kTrained) value += b[i] * load(in[i]) + constant[i];
        if constexpr (kResidual) value += load(added[i]);
        store(to + i, value);
      }
    }
  }
}

// [pixels of the output, kernel * kernel * C]: what each window reads of x, or of act(x * scale + shift); 0 outside.
template <typename T, int kAct>
void patches(const T* x, const float* scale, const float* shift, const Window& s, T* out, int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t line = 0; line < s.n * s.out_height; ++line) {
    const int64_t image = line / s.out_height, out_row = line % s.out_height;
    T* to = out + line * s.out_width * s.kernel * s.kernel * s.c;
    for (int64_t out_column = 0; out_column < s.out_width; ++out_column) {
      for (int64_t tap = 0; tap < s.kernel * s.kernel; ++tap, to += s.c) {
        const int64_t row = out_row * s.stride - s.top + tap / s.kernel;
        const int64_t column = out_column * s.stride - s.left + tap % s.kernel;
        if (row < 0 || row >= s.height || column < 0 || column >= s.width) {
          std::memset(to, 0, s.c * sizeof(T));
          continue;
        }
        const T* in = x + ((image * s.height + row) * s.width + column) * s.c;
        if constexpr (kAct != kNone) {
#pragma omp simd
          for (int64_t i = 0; i < s.c; ++i) store(to + i, activated<kAct>(load(in[i]) * scale[i] + shift[i]));
        } else {
          std::memcpy(to, in, s.c * sizeof(T));
        }
      }
    }
  }
}

// A tensor [n, height, width, c] and every stride-th of its pixels, which are those of [n, out_height, out_width, out_c].
struct Apart {
  int64_t n, height, width, c, out_height, out_width, out_c, stride;
};

// relu(y * scale + shift + shortcut) for every stride-th pixel of a shortcut, added to as many of the first channels as both have.
template <typename T, bool kRelu>
void normalise_apart(const T* y, const float* scale, const float* shift, const T* shortcut, const Apart& s, T* out,
                     int64_t threads) {
  const int64_t shared = std::min(s.c, s.out_c);
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t line = 0; line < s.n * s.out_height; ++line) {
    const T* added = shortcut + (line / s.out_height * s.height + line % s.out_height * s.stride) * s.width * s.c;
    for (int64_t pixel = line * s.out_width; pixel < (line + 1) * s.out_width; ++pixel, added += s.stride * s.c) {
      const T* in = y + pixel * s.out_c;
      T* to = out + pixel * s.out_c;
#pragma omp simd
      for (int64_t i = 0; i < shared; ++i) {
        const float value = load(in[i]) * scale[i] + shift[i] + load(added[i]);
        store(to + i, kRelu ? relu(value) : value);
      }
#pragma omp simd
      for (int64_t i = shared; i < s.out_c; ++i) {
        const float value = load(in[i]) * scale[i] + shift[i];
        store(to + i, kRelu ? relu(value) : value);
      }
    }
  }
}

// Adds the first channels of a gradient [n, out_height, out_width, out_c] to every stride-th pixel of dx.
template <typename T>
void add_apart(const T* gradient, const Apart& s, T* dx, int64_t threads) {
  const int64_t shared = std::min(s.c, s.out_c);
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t line = 0; line < s.n * s.out_height; ++line) {
    T* to = dx + (line / s.out_height * s.height + line % s.out_height * s.stride) * s.width * s.c;
    const T* from = gradient + line * s.out_width * s.out_c;
    for (int64_t column = 0; column < s.out_width; ++column, to += s.stride * s.c, from += s.out_c)
#pragma omp simd
      for (int64_t i = 0; i < shared; ++i) store(to + i, load(to[i]) + load(from[i]));
  }
}

template <typename Function>
void with(bool flag, Function function) {
  flag ? function(std::true_type{}) : function(std::false_type{});
}

template <typename Function>
void with_act(int64_t act, Function function) {
  if (act == kNone) {
    function(std::integral_constant<int, kNone>{});
  } else if (act == kRelu) {
    function(std::integral_constant<int, kRelu>{});
  } else {
    function(std::integral_constant<int, kGelu>{});
  }
}

template <typename T>
void moments_of(const T* x, const T* residual, T* out, int64_t m, int64_t c, int64_t rows, float* mean, float* m2,
                int64_t threads) {
  with(out != nullptr, [&](auto copy) {
    with(residual != nullptr, [&](auto added) {
      moments<T, copy, added>(x, residual, out, m, c, rows, mean, m2, threads);
    });
  });
}

template <typename T>
void normalise_of(const T* y, const float* coef, const T* shortcut, const float* shortcut_coef, int64_t act, T* out,
                  int64_t m, int64_t c, int64_t rows, int64_t threads) {
  const float *scale = coef + 3 * c, *shift = coef + 4 * c;
  const float* shortcut_scale = shortcut_coef ? shortcut_coef + 3 * c : nullptr;
  const float* shortcut_shift = shortcut_coef ? shortcut_coef + 4 * c : nullptr;
  with_act(act, [&](auto activation) {
    const auto run = [&](auto kind) {
      normalise<T, kind, activation>(y, scale, shift, shortcut, shortcut_scale, shortcut_shift, out, m, c, rows, threads);
    };
    if (!shortcut) {
      run(std::integral_constant<int, 0>{});
    } else if (!shortcut_coef) {
      run(std::integral_constant<int, 1>{});
    } else {
      run(std::integral_constant<int, 2>{});
    }
  });
}

template <typename T>
void backward_sums_of(const T* dout, const T* residual, const T* ref, const float* ref_coef, bool gelu,
                      const T* shortcut, const T* y, const float* coef, const T* second_y, const float* second_coef, T* dz, float* sums,
                      float* second_sums, int64_t m, int64_t c, int64_t rows, int64_t threads) {
  const T* const ys[] = {y, second_y};
  const float* const coefs[] = {coef, second_coef};
  float* const all_sums[] = {sums, second_sums};
  const float* scale = ref_coef ? ref_coef + 3 * c : nullptr;
  const float* shift = ref_coef ? ref_coef + 4 * c : nullptr;
  with(residual != nullptr, [&](auto added) {
    with(dz != nullptr, [&](auto stored) {
      const auto run = [&](auto mask, auto norms) {
        backward_sums<T, added, mask, stored, norms>(dout, residual, ref, scale, shift, shortcut, ys, coefs, dz, all_sums,
                                                     m, c, rows, threads);
      };
      const auto masked = [&](auto norms) {
        if (!ref) {
          run(std::integral_constant<int, 0>{}, norms);
        } else if (!ref_coef) {
          run(std::integral_constant<int, 1>{}, norms);
        } else if (!gelu) {
          run(std::integral_constant<int, 2>{}, norms);
        } else if (norms > 1) {
          run(std::integral_constant<int, (norms > 1) ? 5 : 3>{}, norms);
        } else if (shortcut) {
          run(std::integral_constant<int, 4>{}, norms);
        } else {
          run(std::integral_constant<int, 3>{}, norms);
        }
      };
      if (second_y) {
        masked(std::integral_constant<int, 2>{});
      } else {
        masked(std::integral_constant<int, 1>{});
      }
    });
  });
}

}  // namespace

// Coefficients [5, C] (mean, biased variance, rstd, scale, shift) of blocks' statistics, merged in fp64 (Chan et al. 1979).
extern "C" void fastres_finalize(const float* count, const float* mean, const float* m2, const float* gamma,
                                 const float* beta, double eps, int64_t blocks, int64_t c, float* coef) {
  double total = 0;
  for (int64_t block = 0; block < blocks; ++block) total += count[block];
  std::vector<double> merged(c), squares(c);
  for (int64_t block = 0; block < blocks; ++block)
#pragma omp simd
    for (int64_t i = 0; i < c; ++i) merged[i] += double(count[block]) * mean[block * c + i];
#pragma omp simd
  for (int64_t i = 0; i < c; ++i) merged[i] /= total;
  for (int64_t block = 0; block < blocks; ++block)
#pragma omp simd
    for (int64_t i = 0; i < c; ++i) {
      const double away = mean[block * c + i] - merged[i];
      squares[i] += m2[block * c + i] + double(count[block]) * away * away;
    }
#pragma omp simd
  for (int64_t i = 0; i < c; ++i) {
    const double var = squares[i] / total, rstd = 1 / std::sqrt(var + eps), scale = gamma ? rstd * gamma[i] : rstd;
    coef[i] = float(merged[i]);
    coef[c + i] = float(var);
    coef[2 * c + i] = float(rstd);
    coef[3 * c + i] = float(scale);
    coef[4 * c + i] = float((beta ? beta[i] : 0) - merged[i] * scale);
  }
}

// Coefficients [5, C] of a mean and a biased variance, in fp64.
extern "C" void fastres_running_coef(const float* mean, const float* var, const float* gamma, const float* beta, double eps,
                                     int64_t c, float* coef) {
#pragma omp simd
  for (int64_t i = 0; i < c; ++i) {
    const double rstd = 1 / std::sqrt(var[i] + eps), scale = gamma ? rstd * gamma[i] : rstd;
    coef[i] = mean[i];
    coef[c + i] = var[i];
    coef[2 * c + i] = float(rstd);
    coef[3 * c + i] = float(scale);
    coef[4 * c + i] = float((beta ? beta[i] : 0) - mean[i] * scale);
  }
}

// A, B, C of dy = A*dz + B*y + C, and the gradients of gamma and beta, from blocks' sums [T, 2, C]; added up in fp64.
extern "C" void fastres_backward_coef(const float* sums, const float* coef, int64_t blocks, int64_t c, double count,
                                      bool training, float* abc, float* dgamma, float* dbeta) {
  std::vector<double> total(2 * c);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < 2 * c; ++i) total[i] += sums[block * 2 * c + i];
#pragma omp simd
  for (int64_t i = 0; i < c; ++i) {
    const double mean = coef[i], rstd = coef[2 * c + i], scale = coef[3 * c + i];
    const double b = training ? -scale * rstd * total[c + i] / count : 0;
    dbeta[i] = float(total[i]);
    dgamma[i] = float(total[c + i]);
    abc[i] = float(scale);
    abc[c + i] = float(b);
    abc[2 * c + i] = float(training ? -scale * total[i] / count - b * mean : 0);
  }
}

// a * b + c, rounded once where the CPU has an instruction for that.
inline float multiplied_and_added(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// Of many BatchNorms, each in a table: a running mean and variance [C], coefficients that begin with the batch's mean and biased
// variance, C, and the bits of the factor to the unbiased variance. Counters, of as many batches, are one higher behind it.
extern "C" void fastres_update_running(const int64_t* table, int64_t count, const int64_t* counters, int64_t counted,
                                       double momentum) {
  struct Norm {
    float *mean, *var;
    const float* coef;
    int64_t c;
    double correction;
  };
  for (int64_t n = 0; n < counted; ++n) ++*reinterpret_cast<int64_t*>(counters[n]);
  const float share = float(momentum);
  const auto move = [share](float* running, float value) {  // with PyTorch's bits: `lerp` rounds the value, then once
    asm("" : "+m"(value));  // so that it is rounded
    const float away = value - *running;
    *running = share < 0.5f ? multiplied_and_added(share, away, *running) : multiplied_and_added(share - 1, away, value);
  };
  for (int64_t n = 0; n < count; ++n) {
    Norm norm;
    std::memcpy(&norm, table + n * 5, sizeof norm);
    const float correction = float(norm.correction);
    for (int64_t i = 0; i < norm.c; ++i) {
      move(norm.mean + i, norm.coef[i]);
      move(norm.var + i, norm.coef[norm.c + i] * correction);
    }
  }
}

extern "C" void fastres_copy(const char* from, char* to, int64_t bytes) { std::memcpy(to, from, bytes); }

#define FASTRES_PASSES(T, NAME)                                                                                        \
  extern "C" void fastres_moments_##NAME(const T* x, const T* residual, T* out, int64_t m, int64_t c, int64_t rows,    \
                                         float* mean, float* m2, int64_t threads) {                                    \
    moments_of(x, residual, out, m, c, rows, mean, m2, threads);                                                       \
  }                                                                                                                    \
  extern "C" void fastres_normalise_##NAME(const T* y, const float* coef, const T* shortcut,                           \
                                           const float* shortcut_coef, int64_t act, T* out, int64_t m, int64_t c,      \
                                           int64_t rows, int64_t threads) {                                            \
    normalise_of(y, coef, shortcut, shortcut_coef, act, out, m, c, rows, threads);                                     \
  }                                                                                                                    \
  extern "C" void fastres_backward_sums_##NAME(const T* dout, const T* residual, const T* ref, const float* ref_coef,  \
                                               bool gelu, const T* shortcut, const T* y, const float* coef,            \
                                               const T* second_y,                                                      \
                                               const float* second_coef, T* dz, float* sums, float* second_sums,       \
                                               int64_t m, int64_t c, int64_t rows, int64_t threads) {                  \
    backward_sums_of(dout, residual, ref, ref_coef, gelu, shortcut, y, coef, second_y, second_coef, dz, sums,          \
                     second_sums, m, c, rows, threads);                                                                \
  }                                                                                                                    \
  extern "C" void fastres_backward_apply_##NAME(const T* dz, const T* y, const float* abc, const T* residual, T* out,  \
                                                int64_t m, int64_t c, int64_t rows, int64_t threads) {                 \
    with(y != nullptr, [&](auto trained) {                                                                             \
      with(residual != nullptr, [&](auto added) {                                                                      \
        backward_apply<T, trained, added>(dz, y, abc, residual, out, m, c, rows, threads);                             \
      });                                                                                                              \
    });                                                                                                                \
  }                                                                                                                    \
  extern "C" void fastres_normalise_apart_##NAME(const T* y, const float* coef, const T* shortcut, const int64_t* sizes, \
                                                 bool relu, T* out, int64_t threads) {                                 \
    Apart s;                                                                                                           \
    std::memcpy(&s, sizes, sizeof s);                                                                                  \
    with(relu, [&](auto with_relu) {                                                                                   \
      normalise_apart<T, with_relu>(y, coef + 3 * s.out_c, coef + 4 * s.out_c, shortcut, s, out, threads);             \
    });                                                                                                                \
  }                                                                                                                    \
  extern "C" void fastres_add_apart_##NAME(const T* gradient, const int64_t* sizes, T* dx, int64_t threads) {          \
    Apart s;                                                                                                           \
    std::memcpy(&s, sizes, sizeof s);                                                                                  \
    add_apart(gradient, s, dx, threads);                                                                               \
  }                                                                                                                    \
  extern "C" void fastres_patches_##NAME(const T* x, const float* coef, int64_t act, const int64_t* window, T* out,    \
                                         int64_t threads) {                                                            \
    const Window s = window_of(window);                                                                                \
    with_act(coef ? act : kNone, [&](auto activation) {                                                                \
      const int64_t c = coef ? s.c : 0;                                                                                \
      patches<T, activation>(x, coef + 3 * c, coef + 4 * c, s, out, threads);                                          \
    });                                                                                                                \
  }

#define FASTRES_PASSES_SLOTS(NAME)        \
  FASTRES_SLOTS(moments_##NAME)           \
  FASTRES_SLOTS(normalise_##NAME)         \
  FASTRES_SLOTS(backward_sums_##NAME)     \
  FASTRES_SLOTS(backward_apply_##NAME)    \
  FASTRES_SLOTS(normalise_apart_##NAME)   \
  FASTRES_SLOTS(add_apart_##NAME)         \
  FASTRES_SLOTS(patches_##NAME)

FASTRES_PASSES(float, float32)
FASTRES_PASSES(bf16, bfloat16)
FASTRES_PASSES_SLOTS(float32)
FASTRES_PASSES_SLOTS(bfloat16)
FASTRES_SLOTS(finalize)
FASTRES_SLOTS(running_coef)
FASTRES_SLOTS(copy)
FASTRES_SLOTS(backward_coef)
