#include "conv.h"

#include <omp.h>

#include <type_traits>
#include <utility>

namespace fastres {
namespace {

constexpr int64_t kScratchBytes = 240 << 10;  // of a unit's packed input; a panel of weights of as much wants room too
constexpr int64_t kWeightBytes = 384 << 10;   // of panels that are taken in turn
constexpr int64_t kDirectPitch = 1024;        // bytes of a pixel that is read where it is, at most
constexpr int64_t kUnitPixels = 256;          // few enough that sums in fp32 stay accurate

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

// A group of a tile's rows: where the first is in the packed input, and how many of them are outputs.
struct Group {
  const char* at;
  int64_t count;
};

// A phase's part of a unit: the outputs' pixels in the order of the groups. A thread's next unit takes the same memory.
struct Phase {
  std::vector<Run> runs;
  std::vector<Group> groups;
  std::vector<int64_t> pixels;
  std::vector<std::pair<int64_t, int64_t>> taps;
  std::vector<int64_t> offsets;  // of the taps from the first
  int64_t pairs;                 // of a run

  void clear() { runs.clear(), groups.clear(), pixels.clear(), taps.clear(), offsets.clear(); }

  // Runs that follow one another in both operands become one, where as many do everywhere: few channels make short ones.
  void join(int64_t a_bytes, int64_t b_bytes) {
    const auto follows = [&](size_t i) {
      return runs[i].a == runs[i - 1].a + a_bytes && runs[i].b == runs[i - 1].b + b_bytes;
    };
    size_t many = 1;
    while (many < runs.size() && follows(many)) ++many;
    if (many < 2 || runs.size() % many) return;
    for (size_t i = 1; i < runs.size(); ++i)
      if (follows(i) != (i % many != 0)) return;
    for (size_t i = 0; i < runs.size() / many; ++i) runs[i] = runs[i * many];
    runs.resize(runs.size() / many);
    pairs *= int64_t(many);
  }
};

struct Unit {
  Span images, rows;
};

// How products are cut, for tiles of kGroup rows a group and of kGranule channels.
struct Plan {
  Shape s;
  Axis rows, columns;
  int64_t group, granule;
  int64_t in_channels, out_channels;  // of the products: those of dy and of dx in a data gradient
  int64_t depth, pitch;               // packed channels of a pixel, and its bytes
  bool dense, gathered;               // the packed pixels are the outputs; each output has its taps side by side
  int64_t tap_bytes;                  // of a tap in a panel
  int64_t unit_images, unit_rows, image_cuts, row_cuts;

  Plan(const Shape& shape, bool transposed, int64_t group, int64_t granule)
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
    if (dense && s.stride == 1) {  // one long image of single pixels
      const int64_t pixels = s.n * rows.in * columns.in;
      s.n = 1, rows.in = rows.out = pixels, columns.in = columns.out = 1;
    }
    // groups need equal distances, which rows of other widths do not have
    gathered = !dense && group == 16 && !(columns.phases() == 1 && columns.out % group == 0);
    pitch = 2 * depth % 128 ? 2 * depth : 2 * depth + 64;  // no multiple of lines that share a place in the cache
    const int64_t image_bytes = bytes_of({1, {0, rows.out}}), image_pixels = rows.out * columns.out;
    unit_images = std::max<int64_t>(1, std::min(kScratchBytes / image_bytes, kUnitPixels / image_pixels));
    image_cuts = up(s.n, unit_images);
    if (image_cuts > 1) image_cuts = std::min(s.n, up(image_cuts, 2) * 2);  // threads are an even number as a rule
    unit_rows = rows.out;
    if (unit_images == 1) {
      const int64_t step = rows.phases();
      while (unit_rows > step && (bytes_of({1, {0, unit_rows}}) > kScratchBytes || unit_rows * columns.out > kUnitPixels)) {
        const int64_t fit = std::min(unit_rows * kScratchBytes / bytes_of({1, {0, unit_rows}}), kUnitPixels / columns.out);
        unit_rows = std::max(step, std::min(unit_rows - 1, fit) / step * step);
      }
      const int64_t cuts = up(rows.out, unit_rows);
      unit_rows = up(up(rows.out, cuts), step) * step;  // of equal size
    }
    row_cuts = up(rows.out, unit_rows);
  }

  int64_t count() const { return image_cuts * row_cuts; }
  int64_t panels() const { return up(out_channels, kColumns); }
  int64_t taps() const { return s.kernel_h * s.kernel_w; }

  Unit unit(int64_t index) const {
    const int64_t image = index / row_cuts, row = index % row_cuts * unit_rows;
    const int64_t first = s.n * image / image_cuts, end = s.n * (image + 1) / image_cuts;
    return {{first, end - first}, {row, std::min(unit_rows, rows.out - row)}};
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

// ---- packing of the input ----

// 16 channels, or `lanes`, of `count` pixels.
template <Prologue kPrologue, class Lanes>
void pack_column(const Source& s, int64_t at, int64_t step, int64_t count, int64_t channel, Lanes lanes, int64_t pitch, char* to) {
  const Factors factors = factors_of<kPrologue>(s, channel, lanes);
  at += channel, to += 2 * channel;
  for (int64_t pixel = 0; pixel < count; ++pixel, at += step, to += pitch) {
    const Floats value = value_of<kPrologue>(s, at, factors, lanes);
    store(reinterpret_cast<uint16_t*>(to), value, lanes);
    if constexpr (kPrologue == Prologue::kJoin) {
      if (s.copy) store(s.copy + at, value, lanes);
    }
  }
}

// `count` pixels, `step` channels apart in x from the `at`-th element; behind the channels there are zeros up to the depth.
template <Prologue kPrologue>
void pack_pixels(const Source& s, int64_t at, int64_t step, int64_t count, int64_t channels, const Plan& p, char* to) {
  if (kPrologue == Prologue::kPlain && step == channels && p.pitch == 2 * channels) {
    copy(reinterpret_cast<uint16_t*>(to), s.x + at, count * channels);
    return;
  }
  if (kPrologue == Prologue::kPlain && step == channels && p.depth == 4 && p.pitch == 8) {
    spread(reinterpret_cast<uint16_t*>(to), s.x + at, count, channels);
    return;
  }
  if (kPrologue != Prologue::kPlain && channels == p.depth && channels <= kColumns) {  // few lines, which stay in the cache
    for (int64_t c = 0; c < channels; c += kLanes) {
      if (c + kLanes <= channels) {
        pack_column<kPrologue>(s, at, step, count, c, std::integral_constant<int64_t, kLanes>{}, p.pitch, to);
      } else {
        pack_column<kPrologue>(s, at, step, count, c, channels - c, p.pitch, to);
      }
    }
    return;
  }
  for (int64_t pixel = 0; pixel < count; ++pixel, at += step, to += p.pitch) {
    uint16_t* out = reinterpret_cast<uint16_t*>(to);
    int64_t c = 0;
    if constexpr (kPrologue == Prologue::kPlain) {
      copy(out, s.x + at, channels);
    } else {
      for (; c + kLanes <= channels; c += kLanes) {
        if (c % kColumns == 0) fetch(s, at + c);
        store(out + c, value_of<kPrologue>(s, at + c, c, kLanes), kLanes);
      }
      if (c < channels) store(out + c, value_of<kPrologue>(s, at + c, c, channels - c), channels - c);
      if constexpr (kPrologue == Prologue::kJoin) {
        if (s.copy) copy(s.copy + at, out, channels);
      }
    }
    for (c = channels; c < p.depth; ++c) out[c] = 0;
  }
}

void pack_some(const Source& s, int64_t at, int64_t step, int64_t count, int64_t channels, const Plan& p, char* to) {
  switch (s.prologue) {
    case Prologue::kPlain: return pack_pixels<Prologue::kPlain>(s, at, step, count, channels, p, to);
    case Prologue::kNorm: return pack_pixels<Prologue::kNorm>(s, at, step, count, channels, p, to);
    case Prologue::kGelu: return pack_pixels<Prologue::kGelu>(s, at, step, count, channels, p, to);
    case Prologue::kJoin: return pack_pixels<Prologue::kJoin>(s, at, step, count, channels, p, to);
    case Prologue::kGrad: return pack_pixels<Prologue::kGrad>(s, at, step, count, channels, p, to);
  }
}

void pack_unit(const Source& source, const Plan& p, const Unit& u, char* to) {
  const Span rows = p.packed_rows(u.rows), columns = p.packed_columns();
  const int64_t apart = p.dense ? p.s.stride : 1, width = p.columns.in;  // a dense input is read where outputs are
  const int64_t first = std::clamp<int64_t>(-columns.first, 0, columns.count);
  const int64_t end = p.dense ? columns.count : std::clamp<int64_t>(width - columns.first, first, columns.count);
  for (int64_t image = u.images.first; image < u.images.first + u.images.count; ++image) {
    if (p.dense && apart == 1) {  // columns are single pixels
      const int64_t at = (image * p.rows.in + rows.first) * p.in_channels;
      pack_some(source, at, p.in_channels, rows.count, p.in_channels, p, to);
      to += rows.count * p.pitch;
      continue;
    }
    for (int64_t row = rows.first * apart; row < (rows.first + rows.count) * apart; row += apart, to += columns.count * p.pitch) {
      if (row < 0 || row >= p.rows.in) {
        std::memset(to, 0, columns.count * p.pitch);
        continue;
      }
      std::memset(to, 0, first * p.pitch);
      const int64_t column = p.dense ? 0 : columns.first + first;
      const int64_t at = ((image * p.rows.in + row) * width + column) * p.in_channels;
      pack_some(source, at, apart * p.in_channels, end - first, p.in_channels, p, to + first * p.pitch);
      std::memset(to + end * p.pitch, 0, (columns.count - end) * p.pitch);
    }
  }
}

// ---- the products ----

// What the next unit reads, brought into the cache bit by bit while the present one is multiplied.
class Ahead {
 public:
  void add(const uint16_t* tensor, int64_t first, int64_t count) {
    if (!tensor || count <= 0) return;
    parts_[size_++] = {reinterpret_cast<const char*>(tensor + first), 2 * count};
    lines_ += up(2 * count, 64);
  }
  // For so many steps.
  void divide(int64_t steps) { share_ = up(lines_, std::max<int64_t>(1, steps)) * 64; }
  struct Piece {
    const char* from;
    int64_t bytes;
  };
  // What a step brings in.
  Piece step() {
    while (part_ < size_ && at_ >= parts_[part_].bytes) at_ = 0, ++part_;
    if (part_ == size_) return {nullptr, 0};
    const int64_t bytes = std::min(share_, parts_[part_].bytes - at_);
    at_ += bytes;
    return {parts_[part_].from + at_ - bytes, bytes};
  }

 private:
  struct Part {
    const char* from;
    int64_t bytes;
  };
  Part parts_[2];
  int64_t size_ = 0, lines_ = 0, share_ = 0, part_ = 0, at_ = 0;
};

Ahead ahead_of(const Plan& p, const Unit& u, const Source& source) {
  Ahead ahead;
  const Span rows = p.packed_rows(u.rows);
  const int64_t apart = p.dense ? p.s.stride : 1, last_image = u.images.first + u.images.count - 1;
  const int64_t from = (u.images.first * p.rows.in + std::clamp<int64_t>(rows.first, 0, p.rows.in)) * p.columns.in;
  const int64_t to = (last_image * p.rows.in + std::clamp<int64_t>(rows.first + rows.count, 0, p.rows.in)) * p.columns.in;
  if (apart == 1)  // else most of what lies between is not read
    for (const uint16_t* tensor : {source.x, source.second}) ahead.add(tensor, from * p.in_channels, (to - from) * p.in_channels);
  return ahead;
}

// Sets the runs, groups and pixels of a phase of a unit. Where outputs are gathered, their taps are copied to `gathered`,
// which moves on.
void set_phase(Phase& phase, const Plan& p, const Unit& u, int64_t row_phase, int64_t column_phase, const char* packed,
               char*& gathered) {
  phase.clear();
  const Span rows = p.packed_rows(u.rows), columns = p.packed_columns();
  const int64_t line = columns.count * p.pitch, row_step = p.rows.phases(), column_step = p.columns.phases();
  const auto input = [&](int64_t image, int64_t row, int64_t column, int64_t r, int64_t t) {
    if (p.dense) return (image * rows.count + row - u.rows.first) * line + column * p.pitch;
    return (image * rows.count + p.rows.at(row, r) - rows.first) * line + (p.columns.at(column, t) - columns.first) * p.pitch;
  };
  auto& [runs, groups, pixels, taps, offsets, pairs] = phase;
  pairs = p.depth / 2;
  for (int64_t r = 0; r < p.s.kernel_h; ++r)
    for (int64_t t = 0; t < p.s.kernel_w; ++t)
      if (p.rows.reads(row_phase, r) && p.columns.reads(column_phase, t)) {
        taps.push_back({r, t});
        const auto at = [&](size_t tap) {
          return input(0, u.rows.first + row_phase, column_phase, phase.taps[tap].first, phase.taps[tap].second);
        };
        offsets.push_back(at(taps.size() - 1) - at(0));
        const int64_t a = p.gathered ? 2 * p.depth * int64_t(taps.size() - 1) : offsets.back();
        runs.push_back({a, (r * p.s.kernel_w + t) * p.tap_bytes});
      }
  phase.join(2 * p.depth, p.tap_bytes);
  if (p.dense && p.s.stride == 1) {  // one image of one column
    const int64_t count = u.rows.count;
    pixels.resize(count);
    for (int64_t i = 0; i < count; ++i) pixels[i] = u.rows.first + i;
    groups.resize(up(count, p.group));
    for (size_t i = 0; i < groups.size(); ++i) groups[i] = {packed + int64_t(i) * p.group * p.pitch, p.group};
    if (count % p.group) groups.back().count = count % p.group;
    return;
  }
  const int64_t width = up(p.columns.out - column_phase, column_step);
  for (int64_t image = 0; image < u.images.count; ++image) {
    for (int64_t row = u.rows.first + row_phase; row < u.rows.first + u.rows.count; row += row_step) {
      const int64_t pixel = ((u.images.first + image) * p.rows.out + row) * p.columns.out + column_phase;
      const int64_t taken = int64_t(pixels.size());
      pixels.resize(taken + width);
      for (int64_t i = 0; i < width; ++i) pixels[taken + i] = pixel + i * column_step;
      if (p.dense) continue;
      const char* const from = packed + (taps.empty() ? 0 : input(image, row, column_phase, taps[0].first, taps[0].second));
      const int64_t apart = p.columns.step() * p.pitch;
      if (p.gathered) {
        for (int64_t i = 0; i < width; ++i, gathered += p.gathered_pitch())
          for (size_t tap = 0; tap < taps.size(); ++tap)
            std::memcpy(gathered + 2 * p.depth * tap, from + i * apart + offsets[tap], 2 * p.depth);
        continue;
      }
      for (int64_t i = 0; i < width; i += p.group) groups.push_back({from + i * apart, std::min(p.group, width - i)});
    }
  }
  if (p.dense || p.gathered) {  // outputs lie side by side
    const int64_t count = int64_t(pixels.size()), apart = p.gathered ? p.gathered_pitch() : p.pitch;
    const char* const from = p.gathered ? gathered - count * apart : packed;
    for (int64_t i = 0; i < count; i += p.group) groups.push_back({from + i * apart, std::min(p.group, count - i)});
  }
}

// Groups of a tile: more of them where all outputs are one vector.
template <class Tiles>
int64_t groups_of(const Plan& p) {
  return p.out_channels <= kLanes ? Tiles::kMostGroups : Tiles::kGroups;
}

// Multiplies a tile's groups from the `first` by a panel; the pixels that it took.
template <class Tiles>
int64_t multiply_tile(const Plan& p, const Phase& phase, int64_t first, const int64_t* pixels, const char* panel, int64_t channel,
                      const Epilogue& epilogue, State& state, Ahead& next) {
  alignas(64) float sums[Tiles::kMostGroups * Tiles::kGroup * kColumns];
  const int64_t channels = std::min(kColumns, p.out_channels - channel), vectors = up(channels, kLanes);
  const int64_t apart = p.gathered ? p.gathered_pitch() : p.dense ? p.pitch : p.columns.step() * p.pitch;
  Product product{apart, phase.runs.data(), int64_t(phase.runs.size()), phase.pairs, kLine, nullptr, 0};
  const Ahead::Piece piece = next.step();
  if constexpr (Tiles::kFinishes) {
    product.ahead = piece.from ? piece.from : panel;
    product.ahead_step = up(piece.bytes, std::max<int64_t>(1, product.count * product.pairs / 2));
  } else {
    for (int64_t at = 0; at < piece.bytes; at += 64) __builtin_prefetch(piece.from + at, 0, 2);
  }
  const int64_t groups = std::min(groups_of<Tiles>(p), int64_t(phase.groups.size()) - first);
  const char* at[Tiles::kMostGroups];
  for (int64_t g = 0; g < groups; ++g) at[g] = phase.groups[first + g].at;
  int64_t taken = 0;
  if constexpr (Tiles::kFinishes) {
    if (const Finished* const all = channels % kLanes == 0 ? epilogue.finished() : nullptr) {
      Finished finished[Tiles::kMostGroups];
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t count = phase.groups[first + g].count, from = pixels[taken] * all->pitch + channel;
        finished[g] = *all;
        finished[g].bias += channel, finished[g].to += from, finished[g].pitch *= p.columns.phases(), finished[g].count = count;
        if (all->added) finished[g].added += from;
        for (int64_t i = groups * p.group; i < groups * p.group + count; ++i) {  // the next tile's
          if (all->added && all->added != all->to) __builtin_prefetch(finished[g].added + i * finished[g].pitch);
          __builtin_prefetch(finished[g].to + i * finished[g].pitch, 1);
        }
        taken += count;
      }
      Tiles::finish(product, at, groups, panel, vectors, finished);
      return taken;
    }
  }
  Tiles::multiply(product, at, groups, panel, vectors, sums);
  for (int64_t g = 0; g < groups;) {  // groups that are full are taken at once
    const int64_t begin = g;
    int64_t count = phase.groups[first + g].count;
    while (++g < groups && count == (g - begin) * Tiles::kGroup) count += phase.groups[first + g].count;
    epilogue.take(state, sums + begin * Tiles::kGroup * kColumns, pixels + taken, count, channel, channels);
    taken += count;
  }
  return taken;
}

// All panels of a tile one after the other, so that whole pixels are read and written; where the weights are too large to stay
// in the cache meanwhile, all tiles of a panel.
template <class Tiles>
void multiply_panels(const Plan& p, const std::vector<Phase>& phases, const char* b, Span panels, const Epilogue& epilogue,
                     State* states, Ahead& next) {
  const int64_t panel_bytes = p.taps() * p.tap_bytes, at_once = std::max<int64_t>(1, kWeightBytes / panel_bytes);
  const int64_t groups = groups_of<Tiles>(p);
  int64_t tiles = 0;
  for (const Phase& phase : phases) tiles += up(int64_t(phase.groups.size()), groups);
  next.divide(tiles * panels.count);
  for (int64_t first = 0; first < panels.count; first += at_once) {
    const int64_t end = std::min(first + at_once, panels.count);
    for (const Phase& phase : phases) {
      const int64_t* pixels = phase.pixels.data();
      const int64_t channel = (panels.first + first) * kColumns;
      epilogue.expect(pixels, int64_t(phase.pixels.size()), channel,
                      std::min(p.out_channels - channel, (end - first) * kColumns));
      int64_t taken = 0;
      for (int64_t group = 0; group < int64_t(phase.groups.size()); group += groups, pixels += taken) {
        for (int64_t panel = first; panel < end; ++panel) {
          const int64_t index = panels.first + panel;
          taken = multiply_tile<Tiles>(p, phase, group, pixels, b + index * panel_bytes, index * kColumns, epilogue,
                                       states[panel], next);
        }
      }
    }
  }
}

// Whether a unit's input needs no packing: plain single pixels, whose lines do not share few places in the cache, and tiles that
// end before the tensor does.
bool reads_directly(const Plan& p, const Unit& u, const Source& source) {
  const int64_t tiled = up(u.rows.count, p.group) * p.group;
  return source.prologue == Prologue::kPlain && p.dense && p.s.stride == 1 && p.depth == p.in_channels &&
         2 * p.depth <= kDirectPitch && u.rows.first + tiled <= p.rows.out;
}

Workspace& workspace() {
  thread_local Workspace memory;
  return memory;
}

template <class Tiles>
void multiply_all(const Plan& p, const Source& source, const uint16_t* weights, const Epilogue& epilogue, int64_t threads) {
  const int64_t units = p.count(), panels = p.panels();
  // where there are few units threads share their panels
  const int64_t parts = units % threads && units < 4 * threads ? std::min(panels, up(4 * threads, units)) : 1;
  const char* const b = reinterpret_cast<const char*>(weights);
#pragma omp parallel num_threads(int(threads))
  {
    Tiles::begin();
    std::vector<Phase> phases;
    std::vector<State> states;
    const int64_t jobs = units * parts, team = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t last = jobs * (thread + 1) / team;
    for (int64_t job = jobs * thread / team; job < last; ++job) {
      const int64_t index = job / parts, part = job % parts;
      const Unit u = p.unit(index);
      const Plan::Block block{u.images.count, u.rows};
      const int64_t spatial = up(p.spatial_bytes(block), 64) * 64, all = spatial + p.bytes_of(block);
      const int64_t slack = p.group * std::max(p.gathered_pitch(), p.columns.step() * p.pitch) + 64;  // tiles are whole
      char* const packed = workspace().bytes(all + slack);
      char* gathered = packed + spatial;
      Source of_part = source;
      if (part) of_part.copy = nullptr;
      const bool direct = reads_directly(p, u, source);
      Plan plan = p;
      if (direct) plan.pitch = 2 * p.depth;
      const char* const input = direct ? reinterpret_cast<const char*>(source.x + u.rows.first * p.in_channels) : packed;
      if (!direct) pack_unit(of_part, p, u, packed);
      const int64_t row_phases = std::min(p.rows.phases(), u.rows.count), column_phases = std::min(p.columns.phases(), p.columns.out);
      phases.resize(row_phases * column_phases);
      for (int64_t i = 0; i < row_phases * column_phases; ++i)
        set_phase(phases[i], plan, u, i / column_phases, i % column_phases, input, gathered);
      const int64_t begin = panels * part / parts, end = panels * (part + 1) / parts;
      states.assign(end - begin, State{});
      Ahead next;
      if (job + 1 < last && (job + 1) / parts != index) next = ahead_of(p, p.unit(index + 1), source);
      multiply_panels<Tiles>(plan, phases, b, {begin, end - begin}, epilogue, states.data(), next);
      for (int64_t panel = begin; panel < end; ++panel)
        epilogue.finish(states[panel - begin], index, panel * kColumns, std::min(kColumns, p.out_channels - panel * kColumns));
    }
    Tiles::end();
  }
}

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
  return Plan(s, transposed, Tiles::kGroup, Tiles::kGranule);
}

// ---- packing of weights ----

// A tap's panel of columns `column` to `column` + 31, the outputs k: from w [K, taps, C].
template <class Value>
void pack_tap(const Plan& p, const Value* w, int64_t tap, int64_t column, uint32_t* to) {
  const int64_t pitch = p.taps() * p.in_channels;
  for (int64_t half = 0; half < kColumns; half += kLanes) {
    const int64_t first = column + half;
    for (int64_t c = 0; c < p.depth; c += 2 * kLanes)
      transpose(w + first * pitch + tap * p.in_channels + c, pitch, p.out_channels - first, p.in_channels - c,
                std::min(kLanes, (p.depth - c) / 2), to + c / 2 * kColumns + half);
  }
}

// The same with the channels c as columns and pairs of outputs k.
template <class Value>
void pack_transposed_tap(const Plan& p, const Value* w, int64_t tap, int64_t column, uint32_t* to) {
  const int64_t columns = std::min(kColumns, p.out_channels - column), pitch = p.taps() * p.out_channels;
  for (int64_t k = 0; k < p.depth; k += 2, to += kColumns) {
    const Value* const row = w + k * pitch + tap * p.out_channels + column;
    for (int64_t i = 0; i < kColumns; i += kLanes) {
      const Floats first = k < p.in_channels ? load(row + i, std::max<int64_t>(0, columns - i)) : Floats{};
      const Floats second = k + 1 < p.in_channels ? load(row + pitch + i, std::max<int64_t>(0, columns - i)) : Floats{};
      const Words both = std::is_same_v<Value, float> ? paired(first, second) : (Words)first >> 16 | (Words)second;
      std::memcpy(to + i, &both, sizeof both);
    }
  }
}

}  // namespace

void multiply(Form form, const Shape& shape, bool transposed, const Source& source, const uint16_t* weights,
              const Epilogue& epilogue, int64_t threads) {
  with_tiles(form, shape, transposed, [&](auto tiles) {
    multiply_all<decltype(tiles)>(plan_of(tiles, shape, transposed), source, weights, epilogue, threads);
  });
}

int64_t units(Form form, const Shape& shape, bool transposed) {
  return with_tiles(form, shape, transposed, [&](auto tiles) { return plan_of(tiles, shape, transposed).count(); });
}

void unit_pixels(Form form, const Shape& shape, bool transposed, float* pixels) {
  with_tiles(form, shape, transposed, [&](auto tiles) {
    const Plan p = plan_of(tiles, shape, transposed);
    for (int64_t i = 0; i < p.count(); ++i) {
      const Unit u = p.unit(i);
      pixels[i] = float(u.images.count * u.rows.count * p.columns.out);
    }
  });
}

int64_t packed_size(Form form, const Shape& shape, bool transposed) {
  return with_tiles(form, shape, transposed, [&](auto tiles) {
    const Plan p = plan_of(tiles, shape, transposed);
    return p.panels() * p.taps() * p.tap_bytes / 2;
  });
}

template <class Value>
void pack(Form form, const Shape& shape, bool transposed, const Value* w, uint16_t* packed, int64_t threads) {
  with_tiles(form, shape, transposed, [&](auto tiles) {
    const Plan p = plan_of(tiles, shape, transposed);
    const auto tap_of = transposed ? pack_transposed_tap<Value> : pack_tap<Value>;
#pragma omp parallel for num_threads(int(threads)) schedule(static)
    for (int64_t job = 0; job < p.panels() * p.taps(); ++job)
      tap_of(p, w, job % p.taps(), job / p.taps() * kColumns, reinterpret_cast<uint32_t*>(packed) + job * p.tap_bytes / 4);
  });
}

template void pack(Form, const Shape&, bool, const uint16_t*, uint16_t*, int64_t);
template void pack(Form, const Shape&, bool, const float*, uint16_t*, int64_t);

}  // namespace fastres
