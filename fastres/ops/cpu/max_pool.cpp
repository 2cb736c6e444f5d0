// Max-pool of inference: values are compared as integers, 64 bytes at a time.
//
// A row of windows takes the maximum of its rows of x first, column by column, then of its columns: a 3x3 window with stride 2
// compares each value 1.5 times down and 1.5 times across where it would 2.25 times.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "slots.h"
#include "window.h"

namespace fastres {
namespace {

constexpr int64_t kBytes = 64;

// Bits of floating-point numbers, and integers that are in the same order, NaN above all others.
template <typename T>
struct Bits;
template <>
struct Bits<uint16_t> {
  typedef int16_t Vector __attribute__((vector_size(kBytes)));
  static constexpr int16_t kMagnitude = 0x7fff, kInfinity = 0x7f80, kLeast = -0x7f81;  // the order's place of -infinity
};
template <>
struct Bits<float> {
  typedef int32_t Vector __attribute__((vector_size(kBytes)));
  static constexpr int32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000, kLeast = -0x7f800001;
};

// Negative numbers are in reverse; twice is back.
template <typename T, class Vector = typename Bits<T>::Vector>
inline Vector reversed(Vector bits) {
  return bits ^ ((bits >> (8 * sizeof(T) - 1)) & Bits<T>::kMagnitude);
}

template <typename T, class Vector = typename Bits<T>::Vector>
inline Vector ordered(Vector bits) {
  return (bits & Bits<T>::kMagnitude) > Bits<T>::kInfinity ? Vector{} + Bits<T>::kMagnitude : reversed<T>(bits);
}

template <class Vector>
inline Vector larger(Vector a, Vector b) {
  return a > b ? a : b;
}

template <class Vector>
inline Vector load_bytes(const void* from, int64_t bytes) {
  Vector value{};
  std::memcpy(&value, from, bytes);
  return value;
}

template <typename T>
void max_pool(const T* x, const int64_t* sizes, T* out, int64_t threads) {
  using Vector = typename Bits<T>::Vector;
  constexpr int64_t kLanes = kBytes / sizeof(T);
  const Window s = window_of(sizes);
  const int64_t vectors = (s.c + kLanes - 1) / kLanes;
  // Calls `function` with each vector of a pixel's channels, and with its bytes, a constant where it is whole.
  const auto for_vectors = [&](auto function) {
    int64_t v = 0;
    for (; (v + 1) * kLanes <= s.c; ++v) function(v, std::integral_constant<int64_t, kBytes>{});
    if (v < vectors) function(v, int64_t((s.c - v * kLanes) * sizeof(T)));
  };
#pragma omp parallel num_threads(int(threads))
  {
    std::vector<Vector> columns(s.width * vectors);
#pragma omp for schedule(static)
    for (int64_t line = 0; line < s.n * s.out_height; ++line) {
      const T* const image = x + line / s.out_height * s.height * s.width * s.c;
      const int64_t top = line % s.out_height * s.stride - s.top;
      const int64_t first_row = std::max<int64_t>(0, top), end_row = std::min(s.height, top + s.kernel);
      for (int64_t column = 0; column < s.width; ++column)
        for_vectors([&](int64_t v, auto bytes) {
          Vector best = Vector{} + Bits<T>::kLeast;
          for (int64_t row = first_row; row < end_row; ++row) {
            const T* const from = image + (row * s.width + column) * s.c + v * kLanes;
            best = larger(best, ordered<T>(load_bytes<Vector>(from, bytes)));
          }
          columns[column * vectors + v] = best;
        });
      for (int64_t pixel = 0; pixel < s.out_width; ++pixel) {
        const int64_t left = pixel * s.stride - s.left;
        const int64_t first = std::max<int64_t>(0, left), end = std::min(s.width, left + s.kernel);
        for_vectors([&](int64_t v, auto bytes) {
          Vector best = Vector{} + Bits<T>::kLeast;
          for (int64_t column = first; column < end; ++column) best = larger(best, columns[column * vectors + v]);
          best = reversed<T>(best);
          std::memcpy(out + (line * s.out_width + pixel) * s.c + v * kLanes, &best, bytes);
        });
      }
    }
  }
}

}  // namespace
}  // namespace fastres

// Max over each window of x [N, H, W, C], or -infinity where it has no pixel; NaN wins.
extern "C" void fastres_plain_max_pool_float32(const float* x, const int64_t* window, float* out, int64_t threads) {
  fastres::max_pool(x, window, out, threads);
}

extern "C" void fastres_plain_max_pool_bfloat16(const uint16_t* x, const int64_t* window, uint16_t* out, int64_t threads) {
  fastres::max_pool(x, window, out, threads);
}

FASTRES_SLOTS(plain_max_pool_float32)
FASTRES_SLOTS(plain_max_pool_bfloat16)
