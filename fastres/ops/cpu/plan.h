// How the products of a convolution, or of its data gradient, are cut: into units of images or rows, and their taps.
#pragma once

#include <algorithm>

#include "conv.h"

namespace fastres {

constexpr int64_t kScratchBytes = 240 << 10;  // of a unit's packed input; a panel of weights of as much wants room too
constexpr int64_t kUnitPixels = 256;  // few enough that sums in fp32 stay accurate
constexpr int64_t kUneven = 64;       // of so many tiles one more or less is little

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -up(-a, b); }
inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

struct Span {
  int64_t first, count;
};

// One axis of the products: which input positions output positions read.
struct Axis {
  int64_t in, out, kernel, stride, before, dilation;
  bool transposed;

  // Input positions from the first to the last that outputs of a span read; not cut to those that are there.
  Span reach(Span outs) const {
    const int64_t last = outs.first + outs.count - 1;
    if (!transposed) {
      const int64_t first = outs.first * stride - before;
      return {first, last * stride - before + (kernel - 1) * dilation + 1 - first};
    }
    const int64_t first = ceil_div(outs.first + before - (kernel - 1) * dilation, stride);
    return {first, std::max<int64_t>(1, floor_div(last + before, stride) + 1 - first)};
  }
  // Outputs are taken in phases, `phases` apart, within which each tap reads equal distances of `step`.
  int64_t phases() const { return transposed ? stride : 1; }
  int64_t step() const { return transposed ? 1 : stride; }
  // Whether the outputs of a phase read a tap.
  bool reads(int64_t phase, int64_t tap) const {
    return !transposed || floor_mod(phase + before - tap * dilation) == 0;
  }
  int64_t most_taps() const {  // of any phase
    int64_t most = 0;
    for (int64_t phase = 0; phase < phases(); ++phase) {
      int64_t taps = 0;
      for (int64_t tap = 0; tap < kernel; ++tap) taps += reads(phase, tap);
      most = std::max(most, taps);
    }
    return most;
  }
  // The input position that an output reads with a tap.
  int64_t at(int64_t out, int64_t tap) const {
    return transposed ? floor_div(out + before - tap * dilation, stride) : out * stride - before + tap * dilation;
  }

 private:
  int64_t floor_mod(int64_t value) const { return value - floor_div(value, stride) * stride; }
};

struct Unit {
  Span images, rows;
};

// How products are cut, for tiles of kGroups groups of kGroup rows and of kGranule channels.
struct Plan {
  Shape s;
  Axis rows, columns;
  int64_t group, granule;
  int64_t in_channels, out_channels;  // of the products: those of dy and of dx in a data gradient
  int64_t depth, pitch;               // packed channels of a pixel, and its bytes
  bool dense, gathered;               // the packed pixels are the outputs; each output has its taps side by side
  int64_t tap_bytes;                  // of a tap in a panel
  int64_t image_cuts, row_cuts = 1, whole_rows = 1;  // units are of whole multiples of so many rows

  Plan(const Shape& shape, bool transposed, int64_t group, int64_t groups, int64_t granule)
      : s(shape),
        rows{shape.in_height, shape.out_height, shape.kernel_h, shape.stride, shape.top, shape.dilation, transposed},
        columns{shape.in_width, shape.out_width, shape.kernel_w, shape.stride, shape.left, shape.dilation, transposed},
        group(group),
        granule(granule) {
    if (transposed) {
      std::swap(rows.in, rows.out);
      std::swap(columns.in, columns.out);
    }
    in_channels = transposed ? s.out_channels : s.in_channels;
    out_channels = transposed ? s.in_channels : s.out_channels;
    depth = up(in_channels, granule) * granule;
    tap_bytes = depth / 2 * kLine;
    dense = s.is_pointwise() && (!transposed || s.stride == 1);
    const bool flat = dense && s.stride == 1;
    if (flat) {  // one long image of single pixels
      const int64_t pixels = s.n * rows.in * columns.in;
      s.n = 1, rows.in = rows.out = pixels, columns.in = columns.out = 1;
    }
    // groups need equal distances, which rows of other widths do not have
    gathered = !dense && group == 16 && !(columns.phases() == 1 && columns.out % group == 0);
    pitch = 2 * depth % 128 ? 2 * depth : 2 * depth + 64;  // no multiple of lines that share a place in the cache
    const int64_t image_bytes = bytes_of({1, {0, rows.out}}), image_pixels = rows.out * columns.out;
    const int64_t unit_images = std::max<int64_t>(1, std::min(kScratchBytes / image_bytes, kUnitPixels / image_pixels));
    image_cuts = up(s.n, unit_images);
    if (image_cuts > 1) image_cuts = std::min(s.n, up(image_cuts, 2) * 2);  // threads are an even number as a rule
    if (unit_images == 1) {
      const int64_t step = rows.phases(), tile = group * groups;
      int64_t unit_rows = rows.out;
      while (unit_rows > step && (bytes_of({1, {0, unit_rows}}) > kScratchBytes || unit_rows * columns.out > kUnitPixels)) {
        const int64_t fit = std::min(unit_rows * kScratchBytes / bytes_of({1, {0, unit_rows}}), kUnitPixels / columns.out);
        unit_rows = std::max(step, std::min(unit_rows - 1, fit) / step * step);
      }
      row_cuts = up(rows.out, unit_rows);
      whole_rows = flat && unit_rows >= tile && rows.out >= kUneven * tile ? tile : step;
    }
  }

  int64_t count() const { return image_cuts * row_cuts; }
  int64_t panels() const { return up(out_channels, kColumns); }
  int64_t taps() const { return s.kernel_h * s.kernel_w; }

  Unit unit(int64_t index) const {
    const int64_t image = index / row_cuts, part = index % row_cuts, steps = up(rows.out, whole_rows);
    const int64_t first = s.n * image / image_cuts, end = s.n * (image + 1) / image_cuts;
    const int64_t row = steps * part / row_cuts * whole_rows;
    return {{first, end - first}, {row, std::min(steps * (part + 1) / row_cuts * whole_rows, rows.out) - row}};
  }

  struct Block {  // a number of images, and rows of outputs
    int64_t images;
    Span rows;
  };

  // Packed pixels of each image, and their first input row and column.
  Span packed_rows(Span outs) const { return dense ? Span{outs.first, outs.count} : rows.reach(outs); }
  Span packed_columns() const { return dense ? Span{0, columns.out} : columns.reach({0, columns.out}); }
  int64_t spatial_bytes(const Block& b) const {
    return b.images * packed_rows(b.rows).count * packed_columns().count * pitch;
  }
  int64_t gathered_pitch() const { return most_taps() * 2 * depth + 64; }
  int64_t most_taps() const { return rows.most_taps() * columns.most_taps(); }
  int64_t bytes_of(const Block& b) const {
    const int64_t all = spatial_bytes(b);
    return gathered ? all + b.images * b.rows.count * columns.out * gathered_pitch() : all;
  }
};

// Calls `function` with the tiles of a form that suit a width of outputs.
template <class Function>
auto with_tiles(Form form, const Shape& s, bool transposed, Function function) {
#if FASTRES_AMX
  if (form == kAmx) return function(AmxTiles());
#endif
#if FASTRES_AVX512
  if (form == kAvx512) {
    const int64_t width = transposed ? up(s.in_width, s.stride) : s.out_width;
    const bool flat = s.is_pointwise() && (!transposed || s.stride == 1);
    return !flat && up(width, 7) * 7 < up(width, 4) * 4 ? function(Avx512Tiles<7>()) : function(Avx512Tiles<4>());
  }
#endif
  return function(PlainTiles());
}

template <class Tiles>
Plan plan_of(Tiles, const Shape& s, bool transposed) {
  return Plan(s, transposed, Tiles::kGroup, Tiles::kGroups, Tiles::kGranule);
}

// Packs what a unit reads.
void pack_unit(const Source& source, const Plan& plan, const Unit& unit, char* to);

}  // namespace fastres
