// The weight gradient of a convolution of few channels, such as a network's first one.
//
// Its channels would leave most of a tile's columns unused. So the outputs k are the columns here, and the rows are what a row of
// the window reads, its taps and channels: side by side in memory, and `stride` pixels on for the next output. As in
// weight_grad.cpp the inner dimension is that of pixels, in pairs of two images. The order of additions depends on nothing but the
// number of threads. Padding beside a row is zeros like any others: a gradient there that is not finite makes NaN of them.

#include <omp.h>

#include "conv.h"

namespace fastres {

#if FASTRES_AVX512
namespace {

constexpr int64_t kGradBytes = 256 << 10;  // of a unit's packed dy

struct Plan {
  const Shape s;
  const Source x, dy;
  const int64_t window = s.kernel_w * s.in_channels, panels = up(s.out_channels, kColumns);
  const int64_t width = (s.out_width - 1) * s.stride + s.kernel_w;  // of a packed row of x
  const int64_t row_words = up(width * s.in_channels + Avx512LineTiles::kGroup, kLanes) * kLanes;  // a tile reads rows behind
  const int64_t unit_rows = std::max<int64_t>(1, kGradBytes / (s.out_width * panels * kLine));
  const int64_t sums = s.kernel_h * window * panels * kColumns;
};

struct Unit {  // rows of the outputs of two images, of which the second may be missing
  int64_t even, row, rows;
  bool both;
};

int64_t packed_rows(const Plan& p, const Unit& u) { return (u.rows - 1) * p.s.stride + p.s.kernel_h; }

// The rows of x, with zeros around the image.
void pack_x(const Plan& p, const Unit& u, uint32_t* to) {
  const Shape& s = p.s;
  const int64_t left = std::min(s.left, p.width) * s.in_channels;
  const int64_t words = std::max<int64_t>(0, std::min(s.in_width, p.width - s.left)) * s.in_channels;
  const int64_t row_pitch = s.in_width * s.in_channels, image_pitch = s.in_height * row_pitch;
  for (int64_t i = 0; i < packed_rows(p, u); ++i, to += p.row_words) {
    std::fill(to, to + p.row_words, 0u);
    const int64_t row = u.row * s.stride - s.top + i;
    if (row < 0 || row >= s.in_height) continue;
    const uint16_t* const even = p.x.x + u.even * image_pitch + row * row_pitch;
    for (int64_t at = 0; at < words; at += kLanes) {
      const int64_t count = std::min(kLanes, words - at);
      const Words second = u.both ? (Words)load(even + image_pitch + at, count) : Words{};
      const Words both = (Words)load(even + at, count) >> 16 | second;
      std::memcpy(to + left + at, &both, 4 * count);
    }
  }
}

// The pixels of dy, a line of 32 outputs in each panel.
template <Prologue kPrologue>
void pack_dy(const Plan& p, const Unit& u, char* to) {
  const int64_t k = p.s.out_channels, pixels = u.rows * p.s.out_width;
  const int64_t image_pitch = p.s.out_height * p.s.out_width * k, from = u.even * image_pitch + u.row * p.s.out_width * k;
  for (int64_t pixel = 0; pixel < pixels; ++pixel)
    each_vector(k, [&](int64_t channel, auto count) {
      const Factors factors = factors_of<kPrologue>(p.dy, channel, count);
      const int64_t at = from + pixel * k + channel;
      const Floats even = value_of<kPrologue>(p.dy, at, factors, count);
      const Floats odd = u.both ? value_of<kPrologue>(p.dy, at + image_pitch, factors, count) : Floats{};
      const Words both = paired(even, odd);
      std::memcpy(to + (channel / kColumns * pixels + pixel) * kLine + channel % kColumns * 4, &both, sizeof both);
    });
}

// Adds a unit's products to `total`, [KH][KW * C][panels * 32].
void multiply(const Plan& p, const Unit& u, const char* x, const char* dy, std::vector<Run>& runs, float* total) {
  const Shape& s = p.s;
  const int64_t pixels = u.rows * s.out_width, pitch = p.panels * kColumns;
  alignas(64) float sums[Avx512LineTiles::kGroup * kColumns];
  for (int64_t r = 0; r < s.kernel_h; ++r) {
    runs.clear();
    for (int64_t row = 0; row < u.rows; ++row) {
      const int64_t of_x = (u.row + row) * s.stride - s.top + r;
      if (of_x < 0 || of_x >= s.in_height) continue;
      runs.push_back({4 * (row * s.stride + r) * p.row_words, row * s.out_width * kLine});
    }
    const Product product{4 * s.stride * s.in_channels, runs.data(), int64_t(runs.size()), s.out_width, kLine, nullptr, 0};
    for (int64_t panel = 0; panel < p.panels; ++panel) {
      const int64_t vectors = up(std::min(kColumns, s.out_channels - panel * kColumns), kLanes);
      for (int64_t j = 0; j < p.window; j += Avx512LineTiles::kGroup) {
        const int64_t rows = std::min(Avx512LineTiles::kGroup, p.window - j);
        const char* const a[] = {x + 4 * j};
        Avx512LineTiles::multiply(product, a, rows, dy + panel * pixels * kLine, vectors, sums);
        float* to = total + (r * p.window + j) * pitch + panel * kColumns;
        for (int64_t row = 0; row < rows; ++row, to += pitch)
          for (int64_t v = 0; v < vectors; ++v)
            store(to + v * kLanes, load(to + v * kLanes, kLanes) + load(sums + row * kColumns + v * kLanes, kLanes), kLanes);
      }
    }
  }
}

}  // namespace

bool has_few_channels(Form form, const Shape& s, const Source& x) {
  return form != kPlain && s.in_channels <= kFewChannels && s.dilation == 1 && x.prologue == Prologue::kPlain;
}

void weight_grad_of_few(const Shape& shape, const Source& x, const Source& dy, float* dw, int64_t threads) {
  const Plan p{shape, x, dy};
  const int64_t rows = up(shape.n, 2) * shape.out_height;
  std::vector<std::vector<float>> totals(threads);
#pragma omp parallel num_threads(int(threads))
  {
    thread_local Workspace of_x, of_dy;
    const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num(), end = rows * (thread + 1) / team;
    std::vector<float> total(p.sums);
    std::vector<Run> runs;
    for (int64_t at = rows * thread / team; at < end;) {
      const int64_t row = at % shape.out_height, even = at / shape.out_height * 2;
      const Unit u{even, row, std::min({p.unit_rows, shape.out_height - row, end - at}), even + 1 < shape.n};
      char* const packed = of_x.bytes(4 * packed_rows(p, u) * p.row_words);
      char* const gradient = of_dy.bytes(u.rows * shape.out_width * p.panels * kLine);
      pack_x(p, u, reinterpret_cast<uint32_t*>(packed));
      dy.prologue == Prologue::kPlain ? pack_dy<Prologue::kPlain>(p, u, gradient) : pack_dy<Prologue::kGrad>(p, u, gradient);
      multiply(p, u, packed, gradient, runs, total.data());
      at += u.rows;
    }
    totals[thread] = std::move(total);
  }
  const int64_t taps = shape.kernel_h * p.window, pitch = p.panels * kColumns;
  for (int64_t k = 0; k < shape.out_channels; ++k)
    for (int64_t tap = 0; tap < taps; ++tap) {
      float sum = 0;
      for (const std::vector<float>& total : totals)
        if (!total.empty()) sum += total[tap * pitch + k];
      dw[k * taps + tap] = sum;
    }
}
#else
bool has_few_channels(Form, const Shape&, const Source&) { return false; }
void weight_grad_of_few(const Shape&, const Source&, const Source&, float*, int64_t) {}
#endif

}  // namespace fastres
