// Max-pool behind BatchNorm and its gradient, and that of inference.
//
// Values are compared as integers in the same order, NaN above all others. What is computed of a value, BatchNorm and ReLU too, is
// so once a row of windows and not once a window; inference takes the maximum of a row's columns first, then of windows.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "slots.h"
#include "vectors.h"
#include "window.h"

namespace fastres {
namespace {

template <typename T>
struct Int;
template <>
struct Int<uint16_t> {
  typedef int16_t Type;
  typedef Type Vector __attribute__((vector_size(64)));
  static constexpr Type kInfinity = 0x7f80, kLeast = -0x8000, kMost = 0x7fff;
};
template <>
struct Int<float> {
  typedef int32_t Type;
  typedef Type Vector __attribute__((vector_size(64)));
  static constexpr Type kInfinity = 0x7f800000, kLeast = -0x7fffffff - 1, kMost = 0x7fffffff;
};

// The bits of numbers of type T as integers in the same order: those of negative numbers are in reverse. Twice is back.
template <typename T, class Vector>
inline Vector reversed(Vector bits) {
  return bits ^ ((bits >> (8 * sizeof(T) - 1)) & Int<T>::kMost);
}

template <typename T, class Vector>
inline Vector ordered(Vector bits) {
  return (bits & Int<T>::kMost) > Int<T>::kInfinity ? Vector{} + Int<T>::kMost : reversed<T>(bits);
}

template <class Vector>
inline Vector larger(Vector a, Vector b) {
  return a > b ? a : b;
}

// Positions of an axis that a window reads.
struct Reach {
  int64_t begin, end;

  Reach(int64_t out, int64_t stride, int64_t before, int64_t kernel, int64_t size)
      : begin(std::max<int64_t>(0, out * stride - before)), end(std::min(size, out * stride - before + kernel)) {}
};

// ---- inference ----

template <typename T>
void plain_max_pool(const T* x, const Window& s, T* out, int64_t threads) {
  constexpr int64_t kWhole = 64 / sizeof(T);
  using Vector = typename Int<T>::Vector;
  const int64_t vectors = up(s.c, kWhole);
#pragma omp parallel num_threads(int(threads))
  {
    std::vector<Vector> columns(s.width * vectors);
#pragma omp for schedule(static)
    for (int64_t line = 0; line < s.n * s.out_height; ++line) {
      const T* const image = x + line / s.out_height * s.height * s.width * s.c;
      const Reach rows(line % s.out_height, s.stride, s.top, s.kernel, s.height);
      for (int64_t column = 0; column < s.width; ++column)
        each_vector<kWhole>(s.c, [&](int64_t c, auto lanes) {
          Vector best = Vector{} + Int<T>::kLeast;
          for (int64_t row = rows.begin; row < rows.end; ++row) {
            Vector bits{};
            std::memcpy(&bits, image + (row * s.width + column) * s.c + c, lanes * sizeof(T));
            best = larger(best, ordered<T>(bits));
          }
          columns[column * vectors + c / kWhole] = best;
        });
      for (int64_t pixel = 0; pixel < s.out_width; ++pixel) {
        const Reach reach(pixel, s.stride, s.left, s.kernel, s.width);
        each_vector<kWhole>(s.c, [&](int64_t c, auto lanes) {
          Vector best = Vector{} + Int<T>::kLeast;
          for (int64_t column = reach.begin; column < reach.end; ++column) best = larger(best, columns[column * vectors + c / kWhole]);
          best = reversed<T>(best);
          std::memcpy(out + (line * s.out_width + pixel) * s.c + c, &best, lanes * sizeof(T));
        });
      }
    }
  }
}

// ---- training ----

using Ints = Int<float>::Vector;

inline Floats rounded_to(const uint16_t*, Floats value) { return rounded(value); }
inline Floats rounded_to(const float*, Floats value) { return value; }

// Max over the window of relu(y * scale + shift), or gelu of that of y * scale + shift; index: the winning tap, row by row, the
// first among equals, NaN too.
template <typename T, bool kWithRelu>
void max_pool(const T* y, const float* scale, const float* shift, bool with_gelu, const Window& s, T* out, uint8_t* index,
              int64_t threads) {
  const int64_t vectors = up(s.c, kLanes), line_vectors = s.width * vectors;
#pragma omp parallel num_threads(int(threads))
  {
    std::vector<Ints> values(s.kernel * line_vectors);  // of a row of windows, ordered
#pragma omp for schedule(static)
    for (int64_t line = 0; line < s.n * s.out_height; ++line) {
      const int64_t image = line / s.out_height, first_row = line % s.out_height * s.stride - s.top;
      const Reach rows(line % s.out_height, s.stride, s.top, s.kernel, s.height);
      Ints* to = values.data();
      for (int64_t row = rows.begin; row < rows.end; ++row)
        for (int64_t column = 0; column < s.width; ++column, to += vectors) {
          const T* const from = y + ((image * s.height + row) * s.width + column) * s.c;
          each_vector(s.c, [&](int64_t c, auto lanes) {
            const Floats value = load(from + c, lanes) * load(scale + c, lanes) + load(shift + c, lanes);
            to[c / kLanes] = ordered<float>((Ints)rounded_to(from, kWithRelu ? relu(value) : value));
          });
        }
      for (int64_t pixel = 0; pixel < s.out_width; ++pixel) {
        const int64_t first_column = pixel * s.stride - s.left, at = (line * s.out_width + pixel) * s.c;
        const Reach columns(pixel, s.stride, s.left, s.kernel, s.width);
        each_vector(s.c, [&](int64_t c, auto lanes) {
          const auto value_at = [&](int64_t row, int64_t column) {
            return values[(row - rows.begin) * line_vectors + column * vectors + c / kLanes];
          };
          Ints best = Ints{} + Int<float>::kLeast;
          Words winner{};
          for (int64_t row = rows.begin; row < rows.end; ++row)
            for (int64_t column = columns.begin; column < columns.end; ++column) best = larger(best, value_at(row, column));
          for (int64_t row = rows.end; row-- > rows.begin;)
            for (int64_t column = columns.end; column-- > columns.begin;) {
              const uint32_t tap = uint32_t((row - first_row) * s.kernel + column - first_column);
              winner = value_at(row, column) == best ? Words{} + tap : winner;
            }
          const Floats value = (Floats)reversed<float>(best);
          store(out + at + c, with_gelu ? gelu(value) : value, lanes);
          store(index + at + c, winner, lanes);
        });
      }
    }
  }
}

// The windows that read a position of an axis, and by which tap; the lowest tap first.
struct Readers {
  static constexpr int64_t kMost = 16;  // taps of a side, as in geometry.py: a window's are numbered by a byte
  int64_t count = 0, out[kMost], tap[kMost];

  Readers(int64_t position, int64_t stride, int64_t before, int64_t kernel, int64_t size) {
    for (int64_t t = (position + before) % stride; t < kernel && t <= position + before; t += stride) {
      out[count] = (position + before - t) / stride, tap[count] = t;
      count += out[count] < size;
    }
  }
};

// The gradient at y's BatchNorm output where windows neither overlap nor leave padding: each pixel has one or none.
template <typename T>
void max_pool_backward_apart(const T* dout, const uint8_t* index, const Window& s, T* grad, int64_t threads) {
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t line = 0; line < s.n * s.height; ++line) {
    const int64_t row = line % s.height, out_row = row / s.stride, out_width = out_row < s.out_height ? s.out_width : 0;
    const uint32_t first_tap = uint32_t(row % s.stride * s.kernel);
    int64_t at = (line / s.height * s.out_height + out_row) * s.out_width * s.c;
    T* to = grad + line * s.width * s.c;
    for (int64_t pixel = 0; pixel < out_width; ++pixel, at += s.c, to += s.kernel * s.c)
      each_vector(s.c, [&](int64_t c, auto lanes) {
        const Floats gradient = load(dout + at + c, lanes);
        const Words winner = load(index + at + c, lanes);
        for (int64_t t = 0; t < s.kernel; ++t)
          store(to + t * s.c + c, winner == first_tap + uint32_t(t) ? gradient : Floats{}, lanes);
      });
    std::memset(to, 0, (s.width - out_width * s.kernel) * s.c * sizeof(T));
  }
}

// The same of any windows: each pixel sums those that it won, tap after tap.
template <typename T>
void max_pool_backward(const T* dout, const uint8_t* index, const Window& s, T* grad, int64_t threads) {
  std::vector<Readers> of_columns;
  for (int64_t column = 0; column < s.width; ++column) of_columns.emplace_back(column, s.stride, s.left, s.kernel, s.out_width);
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t line = 0; line < s.n * s.height; ++line) {
    const int64_t first = line / s.height * s.out_height;
    const Readers rows(line % s.height, s.stride, s.top, s.kernel, s.out_height);
    for (int64_t column = 0; column < s.width; ++column) {
      const Readers& columns = of_columns[column];
      int64_t count = 0, at[Readers::kMost * Readers::kMost];
      uint32_t tap[Readers::kMost * Readers::kMost];
      for (int64_t i = 0; i < rows.count; ++i)
        for (int64_t j = 0; j < columns.count; ++j, ++count) {
          at[count] = ((first + rows.out[i]) * s.out_width + columns.out[j]) * s.c;
          tap[count] = uint32_t(rows.tap[i] * s.kernel + columns.tap[j]);
        }
      each_vector(s.c, [&](int64_t c, auto lanes) {
        Floats sum{};
        for (int64_t i = 0; i < count; ++i) {
          const int64_t from = at[i] + c;
          sum += load(index + from, lanes) == tap[i] ? load(dout + from, lanes) : Floats{};
        }
        store(grad + (line * s.width + column) * s.c + c, sum, lanes);
      });
    }
  }
}

}  // namespace
}  // namespace fastres

using namespace fastres;

#define FASTRES_MAX_POOL(T, NAME)                                                                                         \
  /* Max over each window of x [N, H, W, C]. */                                                                           \
  extern "C" void fastres_plain_max_pool_##NAME(const T* x, const int64_t* window, T* out, int64_t threads) {             \
    plain_max_pool(x, window_of(window), out, threads);                                                                   \
  }                                                                                                                       \
  extern "C" void fastres_max_pool_##NAME(const T* y, const float* coef, int64_t act, const int64_t* window, T* out,      \
                                          uint8_t* index, int64_t threads) {                                              \
    const Window s = window_of(window);                                                                                   \
    (act == kRelu ? max_pool<T, true> : max_pool<T, false>)(y, coef + 3 * s.c, coef + 4 * s.c, act == kGelu, s, out,      \
                                                            index, threads);                                              \
  }                                                                                                                       \
  extern "C" void fastres_max_pool_backward_##NAME(const T* dout, const uint8_t* index, const int64_t* window, T* grad,   \
                                                   int64_t threads) {                                                     \
    const Window s = window_of(window);                                                                                   \
    const bool apart = s.kernel == s.stride && s.top == 0 && s.left == 0;                                                 \
    (apart ? max_pool_backward_apart<T> : max_pool_backward<T>)(dout, index, s, grad, threads);                           \
  }                                                                                                                       \
  FASTRES_SLOTS(plain_max_pool_##NAME)                                                                                    \
  FASTRES_SLOTS(max_pool_##NAME)                                                                                          \
  FASTRES_SLOTS(max_pool_backward_##NAME)

FASTRES_MAX_POOL(float, float32)
FASTRES_MAX_POOL(uint16_t, bfloat16)
