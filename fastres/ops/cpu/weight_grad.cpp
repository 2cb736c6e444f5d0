// The weight gradient of a convolution as products of tiles.
//
// dw[k][r][t][c] = sum over images and pixels of dy[..][k] * x[..][c], the pixel of x moved by the tap (r, t). The inner
// dimension is that of pixels, whose pairs are made of two images, so that they pair up whatever the stride and the tap; the
// pixels of a pointwise convolution are taken as images of one row. Units of pairs of images and rows are packed, x and dy made
// of what the layers left on the way, as many as a core's cache keeps; each tile of dw (a tap, some outputs k, 32 channels c)
// is summed over a unit, then added to the thread's dw. The order of additions depends on nothing but the number of threads.

#include <omp.h>

#include "conv.h"

namespace fastres {
namespace {

constexpr int64_t kUnitBytes = 768 << 10, kGradBytes = 512 << 10;  // of a unit's packed pixels, of those of dy
constexpr int64_t kOwnBytes = 8 << 20;     // of all threads' own dw
constexpr int64_t kLargeBytes = 2 << 20, kFewPixels = 256;  // of a dw that threads share where each has few pixels
constexpr int64_t kMostPairs = 256;        // of a row of pointwise pixels
constexpr int64_t kPartPairs = 32;         // of a row, packed by one thread; a multiple of kLanes

// Pixels of one of the tensors in memory: their distances in values, and how many columns are there in each image.
struct Pixels {
  int64_t image_pitch, row_pitch, column_pitch, channels;
};

struct Columns {  // of a packed row
  int64_t begin, end;
};

struct Unit {  // pairs of images, and rows of dy
  int64_t first_pair, pairs, first_row, rows;
};

template <class Tiles>
struct Plan {
  static constexpr bool kLines = Tiles::kGroups == 1;  // A lies in lines of a pair of each output, else in rows of one's pairs
  static constexpr int64_t kRows = Tiles::kGroup * Tiles::kGroups;  // outputs of a tile
  const Source x, dy;
  Shape s;
  Pixels of_x, of_dy;
  int64_t images, tail;  // of them all; columns of the last one
  int64_t packed_width, k_panels, c_panels, taps, line_pairs, fit, rows;
  int64_t panel;     // outputs that are packed together: those of a tile, or a vector of them
  int64_t x_line;    // bytes of a pair of x in a panel: a line has half the columns where that is all

  // `workers`: that rows are shared between.
  Plan(const Shape& shape, const Source& x, const Source& dy, int64_t workers) : x(x), dy(dy), s(shape) {
    of_x = {s.in_height * s.in_width * s.in_channels, s.in_width * s.in_channels, s.in_channels, s.in_channels};
    of_dy = {s.out_height * s.out_width * s.out_channels, s.out_width * s.out_channels, s.out_channels, s.out_channels};
    images = s.n;
    if (s.is_pointwise() && s.stride == 1) {
      const int64_t pixels = s.n * s.in_height * s.in_width, pairs = up(pixels, 2);
      const int64_t width = up(pairs, up(up(pairs, kMostPairs), workers) * workers);  // as many rows for each
      s.in_height = s.out_height = 1, s.in_width = s.out_width = width;
      images = up(pixels, width), tail = pixels - (images - 1) * width;
      of_x.image_pitch = width * s.in_channels, of_dy.image_pitch = width * s.out_channels;
    } else if (s.is_pointwise()) {  // without the pixels that are not read
      of_x.row_pitch *= s.stride, of_x.column_pitch *= s.stride;
      s.in_height = s.out_height, s.in_width = s.out_width, s.stride = 1, tail = s.out_width;
    } else {
      tail = s.out_width;
    }
    taps = s.kernel_h * s.kernel_w;
    packed_width = (s.out_width - 1) * s.stride + (s.kernel_w - 1) * s.dilation + 1;
    panel = kLines && s.out_channels > kLanes ? kRows : kLanes;
    x_line = kLines && s.in_channels <= kLanes ? kLine / 2 : kLine;
    k_panels = up(s.out_channels, panel), c_panels = up(s.in_channels, kColumns);
    line_pairs = kLines ? s.out_width : up(s.out_width, kLanes) * kLanes;
    const int64_t x_bytes = s.stride * packed_width * c_panels * x_line, dy_bytes = line_pairs * k_panels * 64;  // of a row
    fit = std::max<int64_t>(1, std::min(kUnitBytes / (x_bytes + dy_bytes), kGradBytes / dy_bytes));
    rows = up(images, 2) * s.out_height;
  }

  // The first unit of rows from `begin` to `end` of all pairs: whole pairs, or some rows of one.
  Unit unit(int64_t begin, int64_t end) const {
    Unit u{begin / s.out_height, 1, begin % s.out_height, 0};
    u.rows = std::min(s.out_height - u.first_row, end - begin);
    if (u.rows == s.out_height && fit >= s.out_height) {
      const int64_t whole = (end - begin) / s.out_height;
      u.pairs = up(whole, up(whole, fit / s.out_height));
    } else {
      u.rows = up(u.rows, up(u.rows, fit));
    }
    return u;
  }

  int64_t packed_rows(const Unit& u) const { return (u.rows - 1) * s.stride + (s.kernel_h - 1) * s.dilation + 1; }
  int64_t x_lines(const Unit& u) const { return u.pairs * packed_rows(u) * packed_width; }  // of a panel
  int64_t dy_pairs(const Unit& u) const { return u.pairs * u.rows * line_pairs; }           // of an output
  // A tile of AMX may read further columns, which count for nothing but must not be NaN.
  int64_t slack() const { return kLines ? 0 : kLanes * s.stride * x_line; }
  int64_t x_bytes(const Unit& u) const { return c_panels * x_lines(u) * x_line + slack(); }
  int64_t bytes(const Unit& u) const { return x_bytes(u) + k_panels * dy_pairs(u) * 64; }
  int64_t most_bytes() const {
    const Unit u{0, std::max<int64_t>(1, fit / s.out_height), 0, std::min(fit, s.out_height)};
    return bytes(u);
  }

  int64_t columns_of(int64_t image) const { return image + 1 == images ? tail : image < images ? s.out_width : 0; }

  // Parts of rows of x and of dy to be packed.
  int64_t packings(const Unit& u) const { return u.pairs * (packed_rows(u) + u.rows) * row_parts(); }
  int64_t row_parts() const { return up(std::max(packed_width, line_pairs), kPartPairs); }

  void pack(const Unit& u, int64_t packing, char* to, uint32_t* of_x_pairs, uint32_t* of_dy_pairs) const {
    const int64_t index = packing / row_parts(), from = packing % row_parts() * kPartPairs;
    const int64_t rows_of_x = packed_rows(u), pair = index / (rows_of_x + u.rows), row = index % (rows_of_x + u.rows);
    const Columns of_row{from, from + kPartPairs};
    const int64_t even = 2 * (u.first_pair + pair);
    if (row >= rows_of_x) {
      const int64_t at = even * of_dy.image_pitch + (u.first_row + row - rows_of_x) * of_dy.row_pitch;
      const int64_t line = (pair * u.rows + row - rows_of_x) * line_pairs;
      dy.prologue == Prologue::kPlain ? pack_dy<Prologue::kPlain>(u, even, at, line, of_row, to + x_bytes(u), of_dy_pairs)
                                      : pack_dy<Prologue::kGrad>(u, even, at, line, of_row, to + x_bytes(u), of_dy_pairs);
      return;
    }
    const int64_t in_row = u.first_row * s.stride - s.top + row, line = (pair * rows_of_x + row) * packed_width;
    if (in_row < 0 || in_row >= s.in_height) {
      const int64_t count = std::max<int64_t>(0, std::min(of_row.end, packed_width) - of_row.begin);
      for (int64_t c_panel = 0; c_panel < c_panels; ++c_panel)
        std::memset(to + (c_panel * x_lines(u) + line + of_row.begin) * x_line, 0, count * x_line);
    } else {
      const int64_t at = even * of_x.image_pitch + in_row * of_x.row_pitch;
      x.prologue == Prologue::kPlain  ? pack_x<Prologue::kPlain>(u, even, at, line, of_row, to, of_x_pairs)
      : x.prologue == Prologue::kGelu ? pack_x<Prologue::kGelu>(u, even, at, line, of_row, to, of_x_pairs)
                                      : pack_x<Prologue::kNorm>(u, even, at, line, of_row, to, of_x_pairs);
    }
    if (packing == 0) std::memset(to + x_bytes(u) - slack(), 0, slack());
  }

  // Pairs of two images' pixels, of which each may be missing, in all channels.
  template <Prologue kPrologue>
  static void pair_pixels(const Source& source, int64_t even, int64_t odd, bool first, bool second, int64_t channels, uint32_t* to) {
    each_vector(channels, [&](int64_t c, auto count) {
      if (c % kColumns == 0) fetch(source, even + c), fetch(source, odd + c);
      const Floats a = first ? value_of<kPrologue>(source, even + c, c, count) : Floats{};
      const Floats b = second ? value_of<kPrologue>(source, odd + c, c, count) : Floats{};
      const Words both = kPrologue == Prologue::kPlain ? (Words)a >> 16 | (Words)b : paired(a, b);
      std::memcpy(to + c, &both, sizeof both);
    });
  }

  template <Prologue kPrologue>
  void pack_x(const Unit& u, int64_t even, int64_t at, int64_t line, Columns of_row, char* to, uint32_t* pairs) const {
    // columns of x that are packed: all, or those of pixels that there are
    const bool flat = s.in_height == 1 && tail != s.out_width;
    const int64_t begin = std::min(packed_width, s.left), end = std::clamp(s.in_width + s.left, begin, packed_width);
    const int64_t width[] = {flat ? columns_of(even) : s.in_width, flat ? columns_of(even + 1) : even + 1 < images ? s.in_width : 0};
    for (int64_t column = of_row.begin; column < std::min(of_row.end, packed_width); ++column) {
      const int64_t i = column - s.left, from = at + i * of_x.column_pitch;
      const bool inside = column >= begin && column < end;
      uint32_t* const line_of_all = reinterpret_cast<uint32_t*>(to + (line + column) * x_line);  // where there is one vector
      pair_pixels<kPrologue>(x, from, from + of_x.image_pitch, inside && i < width[0], inside && i < width[1], s.in_channels,
                             x_line < kLine ? line_of_all : pairs);
      if (x_line < kLine) continue;
      for (int64_t c_panel = 0; c_panel < c_panels; ++c_panel)
        std::memcpy(to + (c_panel * x_lines(u) + line + column) * kLine, pairs + c_panel * kColumns, kLine);
    }
  }

  template <Prologue kPrologue>
  void pack_dy(const Unit& u, int64_t even, int64_t at, int64_t line, Columns of_row, char* to, uint32_t* pairs) const {
    const int64_t width[] = {columns_of(even), columns_of(even + 1)};
    const int64_t pitch = pairs_of_pixel();
    constexpr int64_t kBlock = kLines ? 1 : kLanes;
    for (int64_t block = of_row.begin; block < std::min(of_row.end, line_pairs); block += kBlock) {
      for (int64_t i = 0; i < kBlock; ++i) {
        const int64_t column = block + i, from = at + column * of_dy.column_pitch;
        pair_pixels<kPrologue>(dy, from, from + of_dy.image_pitch, column < width[0], column < width[1], s.out_channels,
                               pairs + i * pitch);
      }
      for (int64_t k_panel = 0; k_panel < k_panels; ++k_panel) {
        const uint32_t* const from = pairs + k_panel * panel;
        if constexpr (kLines) {
          std::memcpy(to + (k_panel * dy_pairs(u) + line + block) * 64, from, 64);
        } else {
          uint32_t* rows = reinterpret_cast<uint32_t*>(to) + k_panel * panel * dy_pairs(u) + line + block;
          transpose(reinterpret_cast<const uint16_t*>(from), 2 * pitch, kLanes, 2 * kLanes, kLanes, rows, dy_pairs(u));
        }
      }
    }
  }

  // Of a pixel's channels and what is copied behind them, which is 0.
  int64_t pairs_of_pixel() const { return std::max(c_panels * kColumns, k_panels * panel + kLanes); }
  // For `pack`: a block of pixels, zeros behind their channels.
  std::vector<uint32_t> row_memory() const { return std::vector<uint32_t>(kLanes * pairs_of_pixel() + kLanes); }

  int64_t dw_size() const { return s.out_channels * taps * s.in_channels; }

  // Adds to a tap's tiles of a panel of channels, or stores the first unit's.
  void multiply(const Unit& u, int64_t job, const char* packed, bool is_first, float* dw) const {
    const int64_t c_panel = job / taps, r = job % taps / s.kernel_w, t = job % taps % s.kernel_w;
    int64_t begin = 0, end = line_pairs;  // columns of dy whose tap is inside of x
    if (kLines) {
      const int64_t moved = t * s.dilation - s.left;
      begin = moved < 0 ? up(-moved, s.stride) : 0;
      end = s.in_width <= moved ? 0 : std::min(s.out_width, up(s.in_width - moved, s.stride));
    }
    std::vector<Run> runs;
    for (int64_t pair = 0; pair < u.pairs && begin < end; ++pair)
      for (int64_t row = 0; row < u.rows; ++row) {
        const int64_t from = row * s.stride + r * s.dilation, at = u.first_row * s.stride - s.top + from;
        if (at < 0 || at >= s.in_height) continue;
        runs.push_back({((pair * u.rows + row) * line_pairs + begin) * (kLines ? 64 : 4),
                        ((pair * packed_rows(u) + from) * packed_width + t * s.dilation + begin * s.stride) * x_line});
      }
    const Product product{kLines ? 64 : 4 * dy_pairs(u), runs.data(), int64_t(runs.size()), end - begin, s.stride * x_line, nullptr, 0};
    const char* const of_dy = packed + x_bytes(u);
    const int64_t vectors = up(std::min(kColumns, s.in_channels - c_panel * kColumns), kLanes);
    const int64_t channels = std::min(kColumns, s.in_channels - c_panel * kColumns), pitch = taps * s.in_channels;
    alignas(64) float sums[std::max(kRows, kLanes) * kColumns];
    const int64_t tile = !kLines || panel == kRows ? kRows : vectors == 1 ? kLanes : kLanes / 2;
    for (int64_t k = 0; k < s.out_channels; k += tile) {
      const int64_t outputs = std::min(tile, s.out_channels - k), groups = kLines ? 1 : up(outputs, Tiles::kGroup);
      const char* a[Tiles::kGroups];
      for (int64_t g = 0; g < groups; ++g)
        a[g] = of_dy + (kLines ? k / panel * 64 : (k + g * Tiles::kGroup) * 4) * dy_pairs(u) + (kLines ? k % panel * 4 : 0);
      float* to = dw + k * pitch + job % taps * s.in_channels + c_panel * kColumns;
      for (int64_t row = 0; row < outputs; ++row)
        for (int64_t v = 0; v < vectors; ++v) __builtin_prefetch(to + row * pitch + v * kLanes, 1, 3);
      Tiles::multiply(product, a, kLines ? outputs : groups, packed + c_panel * x_lines(u) * x_line, vectors, sums);
      for (int64_t row = 0; row < outputs; ++row, to += pitch)
        for (int64_t v = 0; v < vectors; ++v) {
          const Floats sum = load(sums + row * kColumns + v * kLanes, kLanes);
          const int64_t at = v * kLanes, lanes = channels - at;
          store(to + at, is_first ? sum : load(to + at, lanes) + sum, lanes);
        }
    }
  }
};

Workspace& workspace(int which) {
  thread_local Workspace memory[2];
  return memory[which];
}

// Threads share the rows; each adds up units of its own, which no other core's cache has, in a dw of its own.
template <class Tiles>
void apart(const Plan<Tiles>& plan, float* dw, int64_t threads) {
  std::vector<const float*> others(threads);
#pragma omp parallel num_threads(int(threads))
  {
    Tiles::begin();
    const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t begin = plan.rows * thread / team, end = plan.rows * (thread + 1) / team;
    float* const mine = thread ? reinterpret_cast<float*>(workspace(1).bytes(4 * plan.dw_size())) : dw;
    if (thread) others[thread - 1] = mine;
    if (begin == end) std::fill(mine, mine + plan.dw_size(), 0.f);
    std::vector<uint32_t> pairs = plan.row_memory(), of_dy = pairs;
    for (int64_t row = begin; row < end;) {
      const Unit u = plan.unit(row, end);
      char* const packed = workspace(0).bytes(plan.bytes(u));
      for (int64_t i = 0; i < plan.packings(u); ++i) plan.pack(u, i, packed, pairs.data(), of_dy.data());
      for (int64_t job = 0; job < plan.c_panels * plan.taps; ++job) plan.multiply(u, job, packed, row == begin, mine);
      row += u.pairs * u.rows;
    }
    Tiles::end();
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < plan.dw_size(); ++i)
      for (int64_t other = 0; other < team - 1; ++other) dw[i] += others[other][i];
  }
}

// Threads share the tiles of one dw, where it is too large for one each.
template <class Tiles>
void together(const Plan<Tiles>& plan, float* dw, int64_t threads) {
  char* const packed = workspace(0).bytes(plan.most_bytes());
#pragma omp parallel num_threads(int(threads))
  {
    Tiles::begin();
    std::vector<uint32_t> pairs = plan.row_memory(), of_dy = pairs;
    for (int64_t row = 0; row < plan.rows;) {
      const Unit u = plan.unit(row, plan.rows);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < plan.packings(u); ++i) plan.pack(u, i, packed, pairs.data(), of_dy.data());
#pragma omp for schedule(static)
      for (int64_t job = 0; job < plan.c_panels * plan.taps; ++job) plan.multiply(u, job, packed, row == 0, dw);
      row += u.pairs * u.rows;
    }
    Tiles::end();
  }
}

// Whether threads share one dw: it is too large for one each, or so large that adding up one each takes longer than what few
// pixels there are.
bool is_shared(const Shape& s, int64_t threads) {
  const int64_t bytes = 4 * s.out_channels * s.kernel_h * s.kernel_w * s.in_channels;
  return bytes * threads > kOwnBytes || (bytes >= kLargeBytes && s.n * s.out_height * s.out_width < kFewPixels * threads);
}

template <class Tiles>
void weight_grad_with(const Shape& shape, const Source& x, const Source& dy, float* dw, int64_t threads) {
  if (is_shared(shape, threads)) {
    together(Plan<Tiles>(shape, x, dy, 1), dw, threads);
  } else {
    apart(Plan<Tiles>(shape, x, dy, threads), dw, threads);
  }
}

}  // namespace

void weight_grad(Form form, const Shape& shape, const Source& x, const Source& dy, float* dw, int64_t threads) {
  if (has_few_channels(form, shape, x)) return weight_grad_of_few(shape, x, dy, dw, threads);
#if FASTRES_AMX
  if (form == kAmx) return weight_grad_with<AmxTiles>(shape, x, dy, dw, threads);
#endif
#if FASTRES_AVX512
  if (form == kAvx512) return weight_grad_with<Avx512LineTiles>(shape, x, dy, dw, threads);
#endif
  weight_grad_with<PlainTiles>(shape, x, dy, dw, threads);
}

}  // namespace fastres
