// The products: of tiles by panels of weights, unit by unit, with what becomes of their sums.

#include <omp.h>

#include <type_traits>
#include <utility>

#include "plan.h"

namespace fastres {
namespace {

constexpr int64_t kWeightBytes = 384 << 10;  // of panels that are taken in turn
constexpr int64_t kDirectPitch = 1024;       // bytes of a pixel that is read where it is, at most

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

// Multiplies a tile's groups, from the `first`, by panels one after the other; the pixels that it took.
template <class Tiles>
int64_t multiply_tile(const Plan& p, const Phase& phase, int64_t first, const int64_t* pixels, const char* b, Span panels,
                      const Epilogue& epilogue, State* states, Ahead& next) {
  alignas(64) float sums[Tiles::kMostGroups * Tiles::kGroup * kColumns];
  const int64_t apart = p.gathered ? p.gathered_pitch() : p.dense ? p.pitch : p.columns.step() * p.pitch;
  Product product{apart, phase.runs.data(), int64_t(phase.runs.size()), phase.pairs, kLine, nullptr, 0};
  const int64_t steps = std::max<int64_t>(1, product.count * product.pairs / 2);
  const int64_t groups = std::min(groups_of<Tiles>(p), int64_t(phase.groups.size()) - first);
  const Finished* const finished = Tiles::kFinishes ? epilogue.finished() : nullptr;
  const char* at[Tiles::kMostGroups];
  GroupOutputs outputs[Tiles::kMostGroups];
  int64_t taken = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const Group& group = phase.groups[first + g];
    at[g] = group.at;
    outputs[g] = {finished ? pixels[taken] * finished->pitch : 0, group.count};
    taken += group.count;
  }
  Following next_outputs{};
  int64_t share = 0;  // bytes of them with each panel
  if (finished && panels.count == p.panels() && p.columns.phases() == 1) {  // whole pixels, and the next ones lie behind them
    const int64_t behind = (pixels[taken - 1] + 1) * finished->pitch;
    share = 2 * taken * finished->pitch / panels.count;
    next_outputs.to = reinterpret_cast<const char*>(finished->to + behind);
    next_outputs.added = finished->added ? reinterpret_cast<const char*>(finished->added + behind) : next_outputs.to;
    next_outputs.step = up(share, steps);
  }
  for (int64_t index = panels.first; index < panels.first + panels.count; ++index) {
    const char* const panel = b + index * p.taps() * p.tap_bytes;
    const int64_t channel = index * kColumns, channels = std::min(kColumns, p.out_channels - channel);
    const int64_t vectors = up(channels, kLanes);
    const Ahead::Piece piece = next.step();
    if constexpr (Tiles::kFinishes) {
      product.ahead = piece.from ? piece.from : panel;
      product.ahead_step = up(piece.bytes, steps);
      if (finished && channels % kLanes == 0) {
        Finished f = *finished;
        f.bias += channel, f.to += channel, f.pitch *= p.columns.phases();
        if (f.added) f.added += channel;
        Tiles::finish(product, at, groups, panel, vectors, f, outputs, next_outputs);
        next_outputs.to += share, next_outputs.added += share;
        continue;
      }
    } else {
      for (int64_t from = 0; from < piece.bytes; from += 64) __builtin_prefetch(piece.from + from, 0, 2);
    }
    Tiles::multiply(product, at, groups, panel, vectors, sums);
    State& state = states[index - panels.first];
    const int64_t* to = pixels;
    for (int64_t g = 0; g < groups;) {  // groups that are full are taken at once
      const int64_t begin = g;
      int64_t count = outputs[g].count;
      while (++g < groups && count == (g - begin) * Tiles::kGroup) count += outputs[g].count;
      epilogue.take(state, sums + begin * Tiles::kGroup * kColumns, to, count, channel, channels);
      to += count;
    }
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
      for (int64_t group = 0; group < int64_t(phase.groups.size()); group += groups)
        pixels += multiply_tile<Tiles>(p, phase, group, pixels, b, {panels.first + first, end - first}, epilogue,
                                       states + first, next);
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

}  // namespace fastres
