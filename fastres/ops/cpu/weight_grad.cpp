// The weight gradient of a convolution in bf16 with fp32 sums, for CPUs with AVX512-BF16. Where there is AMX too
// its products are faster, and oneDNN's to make.
//
// dw[k][r][s][c] = sum over images and pixels of dy[..][k] * x[..][c], the pixel of x moved by the tap (r, s). The
// instruction multiplies pairs that share a 32-bit lane: here of two images, so that pixels pair up whatever the stride and
// the width, and a tap's windows end where padding begins instead of multiplying zeros. Units of pairs of images and rows
// are copied into lanes, x normalised on the way, as many as a core's cache keeps; each tile of dw (one tap, some outputs
// k and channels c) is summed in registers over a unit, then added to dw. The order of additions depends on nothing but
// the number of threads.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kMostVectors = 4;        // of channels in a tile
constexpr int64_t kGradLanes = 8;          // of a pixel in a panel of outputs
constexpr int64_t kUnitBytes = 768 << 10;  // of a unit's lanes
constexpr int64_t kOwnBytes = 8 << 20;     // of all threads' own dw

struct Problem {
  int64_t n, height, width, c;                     // of x
  int64_t image_pitch, row_pitch, column_pitch;    // of x in memory
  int64_t out_height, out_width, k;                // of dy
  int64_t kernel_h, kernel_w, stride, top, left, dilation;
};

struct Unit {  // pairs of images and rows of dy, with the rows of x that they read
  int64_t first_pair, pairs, first_out, outs, first_row, rows;
};

struct Norm {  // x stands for relu(x * scale + shift)
  const float *scale, *shift;
};

inline int64_t up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Memory for lanes, of each calling thread; grown, never given back: the next step needs as much.
uint32_t* lanes(int64_t count) {
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (size < count) {
    memory.reset();
    size = 0;
    memory.reset(::operator new(count * 4, std::align_val_t(64)));
    size = count;
  }
  return static_cast<uint32_t*>(memory.get());
}

inline __mmask16 first_lanes(int64_t count) { return count >= kLanes ? 0xffff : __mmask16((1 << count) - 1); }

template <bool kNorm>
inline __m512i widened(__mmask16 mask, const uint16_t* from, __m512 scale, __m512 shift) {
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, from);
  if constexpr (!kNorm) return _mm512_cvtepu16_epi32(bits);
  const __m512 x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  const __m512 value = _mm512_fmadd_ps(x, scale, shift);
  const __mmask16 passes = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NLE_UQ);  // NaN does
  return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_mov_ps(passes & mask, value)));
}

// `width` pixels of two images as lanes, `stored` a pixel, those behind the c-th 0; the second image may be missing, then
// its halves are 0.
template <bool kNorm>
void interleave_channels(const uint16_t* even, const uint16_t* odd, int64_t pitch, int64_t width, int64_t c, int64_t stored,
                         Norm norm, uint32_t* to) {
  for (int64_t column = 0; column < width; ++column, even += pitch, odd += odd ? pitch : 0, to += stored) {
    for (int64_t channel = 0; channel < c; channel += kLanes) {
      const __mmask16 mask = first_lanes(c - channel);
      __m512 scale{}, shift{};
      if constexpr (kNorm) {
        scale = _mm512_maskz_loadu_ps(mask, norm.scale + channel);
        shift = _mm512_maskz_loadu_ps(mask, norm.shift + channel);
      }
      __m512i pair = widened<kNorm>(mask, even + channel, scale, shift);
      if (odd) pair = _mm512_or_si512(pair, _mm512_slli_epi32(widened<kNorm>(mask, odd + channel, scale, shift), 16));
      _mm512_store_si512(to + channel, pair);
    }
  }
}

// The same of dy, whose k outputs lie in panels of kOutputs, each with kGradLanes lanes a pixel, `step` from one to the next.
template <int kOutputs>
void interleave_outputs(const uint16_t* even, const uint16_t* odd, int64_t width, int64_t k, int64_t step, uint32_t* to) {
  for (int64_t column = 0; column < width; ++column, even += k, odd += odd ? k : 0, to += kGradLanes) {
    uint32_t* lane = to;
    for (int64_t output = 0; output < k; output += kOutputs, lane += step) {
      const __mmask8 mask = __mmask8((1 << std::min<int64_t>(kOutputs, k - output)) - 1);
      __m256i pair = _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(mask, even + output));
      if (odd) {
        const __m256i second = _mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(mask, odd + output));
        pair = _mm256_or_si256(pair, _mm256_slli_epi32(second, 16));
      }
      _mm256_store_si256((__m256i*)lane, pair);
    }
  }
}

// kVectors * 16 channels and kOutputs outputs of tap (r, s), of which `channels` and `outputs` are there: their sum over the
// unit, added to dw or stored there by the first unit. The sums, kVectors of x and one of dy fit the 32 registers.
template <int kVectors, int kOutputs>
void tile(const Problem& p, const Unit& u, const uint32_t* x, const uint32_t* dy, int64_t r, int64_t s, int64_t channels,
          int64_t outputs, bool is_first, float* dw) {
  constexpr int64_t kWide = kVectors * kLanes;
  __m512 sum[kOutputs][kVectors];
#pragma GCC unroll 8
  for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[o][v] = _mm512_setzero_ps();
  const int64_t moved = s * p.dilation - p.left;  // columns of dy from `begin` to `end` have this tap inside of x
  const int64_t begin = moved < 0 ? up(-moved, p.stride) : 0;
  const int64_t end = p.width <= moved ? 0 : std::min(p.out_width, up(p.width - moved, p.stride));
  for (int64_t pair = 0; pair < u.pairs; ++pair) {
    for (int64_t out = 0; out < u.outs; ++out) {
      const int64_t row = (u.first_out + out) * p.stride + r * p.dilation - p.top;
      if (row < 0 || row >= p.height) continue;
      const uint32_t* in = x + ((pair * u.rows + row - u.first_row) * p.width + begin * p.stride + moved) * kWide;
      const uint32_t* grad = dy + ((pair * u.outs + out) * p.out_width + begin) * kGradLanes;
      for (int64_t column = begin; column < end; ++column, in += p.stride * kWide, grad += kGradLanes) {
        __m512bh a[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) a[v] = (__m512bh)_mm512_load_si512(in + v * kLanes);
#pragma GCC unroll 8
        for (int o = 0; o < kOutputs; ++o) {
          const __m512bh g = (__m512bh)_mm512_set1_epi32(int(grad[o]));
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sum[o][v] = _mm512_dpbf16_ps(sum[o][v], g, a[v]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kOutputs; ++o) {
    float* to = dw + o * p.kernel_h * p.kernel_w * p.c;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (o >= outputs || v * kLanes >= channels) continue;
      const __mmask16 mask = first_lanes(channels - v * kLanes);
      const __m512 before = is_first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, to + v * kLanes);
      _mm512_mask_storeu_ps(to + v * kLanes, mask, _mm512_add_ps(before, sum[o][v]));
    }
  }
}

using Tile = void (*)(const Problem&, const Unit&, const uint32_t*, const uint32_t*, int64_t, int64_t, int64_t, int64_t,
                      bool, float*);

// How a problem is cut, and the pieces of its work.
template <int kOutputs>
struct Plan {
  static constexpr Tile kTiles[] = {tile<1, kOutputs>, tile<2, kOutputs>, tile<3, kOutputs>,
                                    tile<kOutputs == 6 ? 4 : 3, kOutputs>};
  const uint16_t *x, *dy;
  const Norm norm;
  const Problem p;
  const int64_t taps = p.kernel_h * p.kernel_w, reach = (p.kernel_h - 1) * p.dilation + 1;
  const int64_t vectors = up(p.c, kLanes), panel = std::min(vectors, kMostVectors) * kLanes, c_panels = up(p.c, panel);
  const int64_t last = vectors * kLanes - (c_panels - 1) * panel;  // channels of the last panel in memory
  const int64_t k_panels = up(p.k, kOutputs);
  const int64_t row_lanes = p.stride * p.width * vectors * kLanes + p.out_width * k_panels * kGradLanes;
  const int64_t fit = std::max<int64_t>(1, kUnitBytes / 4 / row_lanes);  // rows of dy
  const int64_t rows = up(p.n, 2) * p.out_height;                        // of all pairs
  const int64_t dw_size = p.k * taps * p.c;

  // The first unit of rows from `begin` to `end`: whole pairs, or some rows of one.
  Unit unit(int64_t begin, int64_t end) const {
    Unit u;
    u.first_pair = begin / p.out_height, u.first_out = begin % p.out_height;
    u.outs = std::min(p.out_height - u.first_out, end - begin), u.pairs = 1;
    if (u.outs == p.out_height && fit >= p.out_height) {
      const int64_t whole = (end - begin) / p.out_height;
      u.pairs = up(whole, up(whole, fit / p.out_height));
    } else {
      u.outs = up(u.outs, up(u.outs, fit));
    }
    u.first_row = std::clamp<int64_t>(u.first_out * p.stride - p.top, 0, p.height - 1);
    const int64_t end_row = (u.first_out + u.outs - 1) * p.stride - p.top + reach;
    u.rows = std::clamp<int64_t>(end_row, u.first_row + 1, p.height) - u.first_row;
    return u;
  }

  // Lanes of x before those of dy.
  int64_t x_lanes(const Unit& u) const { return u.pairs * u.rows * p.width * vectors * kLanes; }

  // Most lanes of any unit.
  int64_t most_lanes() const {
    const int64_t pairs = std::max<int64_t>(1, fit / p.out_height), outs = std::min(fit, p.out_height);
    const int64_t most_rows = std::min(p.height, (outs - 1) * p.stride + reach);
    return pairs * (most_rows * p.width * vectors * kLanes + outs * p.out_width * k_panels * kGradLanes);
  }

  // Lanes of a pixel in the panel that begins with channel c.
  int64_t lanes_from(int64_t c) const { return c + panel < p.c ? panel : last; }

  int64_t lines(const Unit& u) const { return u.pairs * (u.rows + u.outs); }

  // Copy one row of x or of dy into lanes.
  void copy(const Unit& u, int64_t line, uint32_t* lane) const {
    const int64_t pair = line / (u.rows + u.outs), at = line % (u.rows + u.outs), even = 2 * (u.first_pair + pair);
    const bool both = even + 1 < p.n;
    if (at >= u.rows) {
      const int64_t out = at - u.rows, size = p.out_height * p.out_width * p.k;
      const uint16_t* from = dy + even * size + (u.first_out + out) * p.out_width * p.k;
      interleave_outputs<kOutputs>(from, both ? from + size : nullptr, p.out_width, p.k,
                                   u.pairs * u.outs * p.out_width * kGradLanes,
                                   lane + x_lanes(u) + (pair * u.outs + out) * p.out_width * kGradLanes);
      return;
    }
    const uint16_t* from = x + even * p.image_pitch + (u.first_row + at) * p.row_pitch;
    const auto run = norm.scale ? interleave_channels<true> : interleave_channels<false>;
    for (int64_t c = 0; c < p.c; c += panel) {
      const int64_t wide = lanes_from(c);
      const Norm here{norm.scale ? norm.scale + c : nullptr, norm.scale ? norm.shift + c : nullptr};
      run(from + c, both ? from + p.image_pitch + c : nullptr, p.column_pitch, p.width, std::min(panel, p.c - c), wide,
          here, lane + u.pairs * u.rows * p.width * c + (pair * u.rows + at) * p.width * wide);
    }
  }

  int64_t tiles() const { return c_panels * taps * k_panels; }

  // Sum up one tile of dw.
  void multiply(const Unit& u, int64_t job, const uint32_t* lane, bool is_first, float* dw) const {
    const int64_t c = job / (taps * k_panels) * panel, tap = job / k_panels % taps, k = job % k_panels;
    const int64_t wide = lanes_from(c);
    const uint32_t* of_dy = lane + x_lanes(u) + u.pairs * u.outs * p.out_width * k * kGradLanes;
    kTiles[wide / kLanes - 1](p, u, lane + u.pairs * u.rows * p.width * c, of_dy, tap / p.kernel_w, tap % p.kernel_w,
                              p.c - c, p.k - k * kOutputs, is_first, dw + (k * kOutputs * taps + tap) * p.c + c);
  }
};

// Threads share the rows; each adds up units of its own, which no other core's cache has, in a dw of its own.
template <int kOutputs>
void apart(const Plan<kOutputs>& plan, float* dw, int64_t threads) {
  const std::unique_ptr<float[]> others(new float[(threads - 1) * plan.dw_size]);
#pragma omp parallel num_threads(int(threads))
  {
    const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t begin = plan.rows * thread / team, end = plan.rows * (thread + 1) / team;
    float* own = thread ? others.get() + (thread - 1) * plan.dw_size : dw;
    uint32_t* lane = lanes(plan.most_lanes());
    if (begin == end) std::fill(own, own + plan.dw_size, 0.f);
    for (int64_t row = begin; row < end;) {
      const Unit u = plan.unit(row, end);
      for (int64_t line = 0; line < plan.lines(u); ++line) plan.copy(u, line, lane);
      for (int64_t job = 0; job < plan.tiles(); ++job) plan.multiply(u, job, lane, row == begin, own);
      row += u.pairs * u.outs;
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < plan.dw_size; ++i)
      for (int64_t other = 0; other < team - 1; ++other) dw[i] += others[other * plan.dw_size + i];
  }
}

// Threads share the tiles of one dw, where it is too large for one each.
template <int kOutputs>
void together(const Plan<kOutputs>& plan, float* dw, int64_t threads) {
  uint32_t* const lane = lanes(plan.most_lanes());
#pragma omp parallel num_threads(int(threads))
  for (int64_t row = 0; row < plan.rows;) {
    const Unit u = plan.unit(row, plan.rows);
#pragma omp for schedule(static)
    for (int64_t line = 0; line < plan.lines(u); ++line) plan.copy(u, line, lane);
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < plan.tiles(); ++job) plan.multiply(u, job, lane, row == 0, dw);
    row += u.pairs * u.outs;
  }
}

template <int kOutputs>
void weight_grad(const uint16_t* x, Norm norm, const uint16_t* dy, const Problem& p, float* dw, int64_t threads) {
  const Plan<kOutputs> plan{x, dy, norm, p};
  (plan.dw_size * 4 * threads <= kOwnBytes ? apart<kOutputs> : together<kOutputs>)(plan, dw, threads);
}

}  // namespace

// dw [K, KH, KW, C] in fp32 of x [N, H, W, C], or of relu(x * scale + shift) with coef [5, C], and dy [N, OH, OW, K].
extern "C" void fastres_weight_grad(const uint16_t* x, const float* coef, const uint16_t* dy, const int64_t* problem,
                                    float* dw, int64_t threads) {
  Problem p;
  std::memcpy(&p, problem, sizeof p);
  const Norm norm{coef ? coef + 3 * p.c : nullptr, coef ? coef + 4 * p.c : nullptr};
  // with four vectors of channels there are registers for six outputs, with fewer for eight
  const auto run = p.c > 3 * kLanes ? weight_grad<6> : weight_grad<8>;
  run(x, norm, dy, p, dw, threads);
}
extern "C" bool fastres_has_weight_grad() { return true; }
#else
extern "C" bool fastres_has_weight_grad() { return false; }
#endif

extern "C" bool fastres_has_amx() {
#if defined(__AMX_BF16__)
  return true;
#else
  return false;
#endif
}
