// Vectors of 16 floats, in fp32 and bf16 in memory, and of pairs of bf16, by AVX512-BF16 or in plain C++.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "gelu.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define FASTRES_AVX512 1
#include <immintrin.h>
#else
#define FASTRES_AVX512 0
#endif

namespace fastres {

constexpr int64_t kLanes = 16;

inline int64_t up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Calls `function` with the first channel of each vector of `kWhole`, and its number of channels, a constant but for the rest.
template <int64_t kWhole = kLanes, class Function>
inline void each_vector(int64_t channels, Function function) {
  int64_t c = 0;
  for (; c + kWhole <= channels; c += kWhole) function(c, std::integral_constant<int64_t, kWhole>{});
  if (c < channels) function(c, channels - c);
}

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

inline Floats all(float value) { return Floats{} + value; }
inline Floats relu(Floats value) { return value <= 0 ? Floats{} : value; }  // NaN stays
inline Floats gelu(Floats value) { return gelu<Floats, Words>(value); }
inline Floats gelu_slope(Floats value) { return gelu_slope<Floats, Words>(value); }

// The first `count` of 16 values in bf16; the others are 0, and not read.
inline Floats load(const uint16_t* from, int64_t count) {
#if FASTRES_AVX512
  const __m256i bits = count >= kLanes ? _mm256_loadu_si256((const __m256i*)from)
                                       : _mm256_maskz_loadu_epi16(__mmask16((1 << count) - 1), from);
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#else
  Words bits{};
  for (int64_t i = 0; i < std::min(count, kLanes); ++i) bits[i] = uint32_t(from[i]) << 16;
  return (Floats)bits;
#endif
}

inline Floats load(const float* from, int64_t count) {
  Floats value{};
  if (count >= kLanes) {
    std::memcpy(&value, from, sizeof value);
  } else {
#if FASTRES_AVX512
    value = (Floats)_mm512_maskz_loadu_ps(__mmask16((1 << count) - 1), from);
#else
    for (int64_t i = 0; i < count; ++i) value[i] = from[i];
#endif
  }
  return value;
}

inline void store(float* to, Floats value, int64_t count) {
  if (count >= kLanes) {
    std::memcpy(to, &value, sizeof value);
  } else {
#if FASTRES_AVX512
    _mm512_mask_storeu_ps(to, __mmask16((1 << count) - 1), (__m512)value);
#else
    for (int64_t i = 0; i < count; ++i) to[i] = value[i];
#endif
  }
}

#if FASTRES_AVX512
inline __m256i narrowed(Floats value) { return (__m256i)_mm512_cvtneps_pbh((__m512)value); }
#else
// To nearest, ties to even; in the upper halves.
inline Words narrowed(Floats value) {
  const Words bits = (Words)value, kept = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  return (bits & 0x7fffffff) > 0x7f800000 ? Words{} + 0x7fc00000 : kept;
}
#endif

// What of them in bf16 is left, in fp32.
inline Floats rounded(Floats value) {
#if FASTRES_AVX512
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrowed(value)), 16);
#else
  return (Floats)narrowed(value);
#endif
}

// Store the first `count` of 16 values in bf16; what is stored, in fp32.
inline Floats store(uint16_t* to, Floats value, int64_t count) {
#if FASTRES_AVX512
  const __m256i bits = narrowed(value);
  if (count >= kLanes) {
    _mm256_storeu_si256((__m256i*)to, bits);
  } else {
    _mm256_mask_storeu_epi16(to, __mmask16((1 << count) - 1), bits);
  }
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#else
  const Words bits = narrowed(value);
  for (int64_t i = 0; i < std::min(count, kLanes); ++i) to[i] = uint16_t(bits[i] >> 16);
  return (Floats)bits;
#endif
}

// The first `count` of 16 bytes; the others are 0, and not read.
inline Words load(const uint8_t* from, int64_t count) {
#if FASTRES_AVX512
  const __mmask16 some = count >= kLanes ? 0xffff : __mmask16((1 << count) - 1);
  return (Words)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, from));
#else
  Words value{};
  for (int64_t i = 0; i < std::min(count, kLanes); ++i) value[i] = from[i];
  return value;
#endif
}

// Store the first `count` of 16 numbers below 256.
inline void store(uint8_t* to, Words value, int64_t count) {
#if FASTRES_AVX512
  _mm512_mask_cvtepi32_storeu_epi8(to, count >= kLanes ? 0xffff : __mmask16((1 << count) - 1), (__m512i)value);
#else
  for (int64_t i = 0; i < std::min(count, kLanes); ++i) to[i] = uint8_t(value[i]);
#endif
}

// Pairs of bf16, the first ones in the lower halves.
inline Words paired(Floats first, Floats second) {
#if FASTRES_AVX512
  const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrowed(second)), 16);
  return (Words)_mm512_or_si512(_mm512_cvtepu16_epi32(narrowed(first)), upper);
#else
  return (narrowed(first) >> 16) | narrowed(second);
#endif
}

// The first `count` of 32 values in bf16, as they are; the others are 0.
inline void copy(uint16_t* to, const uint16_t* from, int64_t count) {
#if FASTRES_AVX512
  for (; count >= 2 * kLanes; count -= 2 * kLanes, from += 2 * kLanes, to += 2 * kLanes)
    _mm512_storeu_si512(to, _mm512_loadu_si512(from));
  if (count) {
    const __mmask32 mask = (__mmask32(1) << count) - 1;
    _mm512_mask_storeu_epi16(to, mask, _mm512_maskz_loadu_epi16(mask, from));
  }
#else
  std::memcpy(to, from, 2 * count);
#endif
}

// `pixels` of at most 4 channels, side by side, to 4 channels each, of which the others are 0.
inline void spread(uint16_t* to, const uint16_t* from, int64_t pixels, int64_t channels) {
#if FASTRES_AVX512
  alignas(64) uint16_t places[32];
  for (int i = 0; i < 32; ++i) places[i] = uint16_t(i / 4 * channels + i % 4);
  const __m512i index = _mm512_load_si512(places);
  const __mmask32 kept = 0x11111111u * ((1u << channels) - 1);
  for (; pixels > 0; pixels -= 8, from += 8 * channels, to += 32) {
    const int64_t count = std::min<int64_t>(8, pixels);
    const auto first = [](int64_t values) { return __mmask32((uint64_t(1) << values) - 1); };
    const __m512i values = _mm512_maskz_loadu_epi16(first(count * channels), from);
    _mm512_mask_storeu_epi16(to, first(4 * count), _mm512_maskz_permutexvar_epi16(kept, index, values));
  }
#else
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t c = 0; c < 4; ++c) to[4 * i + c] = c < channels ? from[i * channels + c] : uint16_t(0);
#endif
}

#if FASTRES_AVX512
// The first `count` of 32 values, in bf16; the others are 0.
inline __m512i load_many(const uint16_t* from, int64_t count) {
  return _mm512_maskz_loadu_epi16(count >= 32 ? ~__mmask32(0) : (__mmask32(1) << std::max<int64_t>(count, 0)) - 1, from);
}
inline __m512i load_many(const float* from, int64_t count) {
  const auto some = [](int64_t n) { return __mmask16((1 << std::clamp<int64_t>(n, 0, kLanes)) - 1); };
  const __m512 second = _mm512_maskz_loadu_ps(some(count - kLanes), from + kLanes);
  return (__m512i)_mm512_cvtne2ps_pbh(second, _mm512_maskz_loadu_ps(some(count), from));
}
#else
inline uint32_t half_of(uint16_t value) { return value; }
inline uint32_t half_of(float value) { return narrowed(all(value))[0] >> 16; }
#endif

// Transposes 16 x 16 pairs: rows of `from`, `pitch` values apart, of which `rows` with `values` values each are there, the rest
// 0; the first `lines` columns become lines, `apart` pairs apart. Values in fp32 are rounded.
template <class Value>
inline void transpose(const Value* from, int64_t pitch, int64_t rows, int64_t values, int64_t lines, uint32_t* to,
                      int64_t apart) {
#if FASTRES_AVX512
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = i < rows ? load_many(from + i * pitch, values) : _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // a[i + j]: in each quarter q column 4q + j of rows i to i + 3
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]), a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), high = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    b[j] = _mm512_shuffle_i32x4(low, low2, 0x88), b[8 + j] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    b[4 + j] = _mm512_shuffle_i32x4(high, high2, 0x88), b[12 + j] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (i < lines) _mm512_storeu_si512(to + i * apart, b[i]);
#else
  for (int64_t line = 0; line < lines; ++line)
    for (int64_t row = 0; row < kLanes; ++row) {
      const auto half = [&](int64_t i) { return row < rows && i < values ? half_of(from[row * pitch + i]) : 0; };
      to[line * apart + row] = half(2 * line) | half(2 * line + 1) << 16;
    }
#endif
}

}  // namespace fastres
