// Packing: of what a unit of products reads, made of what the layer before left, and of weights.

#include <omp.h>

#include <type_traits>

#include "plan.h"

namespace fastres {
namespace {

// ---- of a unit's input ----

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
    each_vector(channels, [&](int64_t c, auto lanes) { pack_column<kPrologue>(s, at, step, count, c, lanes, p.pitch, to); });
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

// ---- of weights ----

// A tap's panel of columns `column` to `column` + 31, the outputs k: from w [K, taps, C].
template <class Value>
void pack_tap(const Plan& p, const Value* w, int64_t tap, int64_t column, uint32_t* to) {
  const int64_t pitch = p.taps() * p.in_channels;
  for (int64_t half = 0; half < kColumns; half += kLanes) {
    const int64_t first = column + half;
    for (int64_t c = 0; c < p.depth; c += 2 * kLanes)
      transpose(w + first * pitch + tap * p.in_channels + c, pitch, p.out_channels - first, p.in_channels - c,
                std::min(kLanes, (p.depth - c) / 2), to + c / 2 * kColumns + half, kColumns);
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
