// Tiles of a matrix product in bf16 with fp32 sums, by the instructions that a CPU has.
//
// A tile multiplies rows of A, which lie at equal distances in groups, by a panel of B of 32 columns. Both are cut into runs
// along the inner dimension, in pairs of bf16: a pair of A is 4 bytes of its row, a pair of B a line of 32 such pairs, one a
// column. So lie both operands of `vdpbf16ps` and of `tdpbf16ps`: what packs them is the same for all three forms here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "vectors.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FASTRES_AMX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define FASTRES_AMX 0
#endif

namespace fastres {

constexpr int64_t kColumns = 32, kLine = 4 * kColumns;  // of a panel, and its bytes a pair

// ---- memory of each thread ----

// Aligned memory that grows and is kept: the next call needs as much.
class Workspace {
 public:
  char* bytes(int64_t count) {
    if (size_ < count) {
      memory_.reset();
      size_ = 0;
      memory_.reset(::operator new(count, std::align_val_t(64)));
      size_ = count;
    }
    return static_cast<char*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

// ---- tiles ----

struct Run {
  int64_t a, b;  // bytes from the row's and from the panel's begin
};

// What a tile multiplies: for each row at `pitch` bytes behind the former one of its group, and each of 32 columns, the sum over
// `runs` of `pairs` each. Lines of B are `line` bytes apart.
struct Product {
  int64_t pitch;
  const Run* runs;
  int64_t count, pairs, line;
  const char* ahead;  // what is brought into the cache meanwhile, `ahead_step` bytes on with every second pair
  int64_t ahead_step;
};

// Outputs that come next: where they begin, where what is added to them does, how many bytes with every second pair.
struct Following {
  const char *to, *added;
  int64_t step;
};

// The same in plain C++, in the geometry of the AMX form.
struct PlainTiles {
  // Rows of a group, groups of a tile, those of one vector, channels that a run is made up of.
  static constexpr int64_t kGroup = 16, kGroups = 2, kMostGroups = 2, kGranule = 32;
  static constexpr bool kFinishes = false;
  static void begin() {}
  static void end() {}

  static void multiply(const Product& p, const char* const* a, int64_t groups, const char* b, int64_t vectors, float* sums) {
    for (int64_t row = 0; row < groups * kGroup; ++row) {
      float sum[kColumns] = {};
      for (int64_t r = 0; r < p.count; ++r) {
        const char* in = a[row / kGroup] + row % kGroup * p.pitch + p.runs[r].a;
        const char* line = b + p.runs[r].b;
        for (int64_t pair = 0; pair < p.pairs; ++pair, in += 4, line += p.line) {
          const float low = half(in), high = half(in + 2);
          for (int64_t i = 0; i < vectors * kLanes; ++i) sum[i] += low * half(line + 4 * i) + high * half(line + 4 * i + 2);
        }
      }
      std::copy(sum, sum + kColumns, sums + row * kColumns);
    }
  }

 private:
  static float half(const char* from) {
    uint16_t bits;
    std::memcpy(&bits, from, 2);
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
};

// What a folded convolution makes of sums, which begin with the bias: relu(sums (+ added)), of outputs that are `pitch` values
// apart.
struct Finished {
  const float* bias;
  const uint16_t* added;
  uint16_t* to;
  int64_t pitch;
  bool rectified;
};

// A group's outputs: values from the first output of all to its first, and how many of its rows are outputs.
struct GroupOutputs {
  int64_t at, count;
};

#if FASTRES_AVX512
// AVX512-BF16: kRows rows a group, so that neither widths of 8 and 16 nor of 7 and 14 leave sums unused.
template <int kRows>
struct Avx512Tiles {
  static constexpr int64_t kGroup = kRows, kGroups = kRows == 7 ? 2 : 3, kMostGroups = kRows == 7 ? 3 : 6, kGranule = 4;
  static constexpr int64_t kFarther = 3072;  // bytes that the panel is fetched ahead: weights are new to the cache each call
  static constexpr int64_t kFew = 64;  // pairs of a tile that take less time than memory to bring the next one's outputs
  static constexpr bool kFinishes = true;  // has `finish`, and looks at `ahead`
  static void begin() {}
  static void end() {}

  static void multiply(const Product& p, const char* const* a, int64_t groups, const char* b, int64_t vectors, float* sums) {
    multiply_to(p, a, groups, b, vectors, ToSums{sums});
  }

  // The same, finished while the sums are in registers.
  static void finish(const Product& p, const char* const* a, int64_t groups, const char* b, int64_t vectors, const Finished& to,
                     const GroupOutputs* of_groups, const Following& next) {
    next.step && p.count * p.pairs <= kFew ? multiply_to(p, a, groups, b, vectors, ToOutputs<true>{to, of_groups, next})
                                           : multiply_to(p, a, groups, b, vectors, ToOutputs<false>{to, of_groups, next});
  }

 private:
  struct ToSums {
    float* sums;
    static constexpr bool kFollowing = false;
    Following following() const { return {}; }
    void expect(int64_t) const {}
    __m512 first(int) const { return _mm512_setzero_ps(); }
    template <int kMany, int kVectors>
    void take(const __m512 (&sum)[kMany * kRows][kVectors]) const {
#pragma GCC unroll 32
      for (int row = 0; row < kMany * kRows; ++row)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) _mm512_store_ps(sums + row * kColumns + v * kLanes, sum[row][v]);
    }
  };

  // With few pairs what comes next is brought in line by line while they are multiplied, else all at once before.
  template <bool kFewPairs>
  struct ToOutputs {
    const Finished& to;
    const GroupOutputs* of_groups;
    const Following& next;

    static constexpr bool kFollowing = kFewPairs;
    Following following() const { return next; }

    void expect(int64_t rows) const {
      const int64_t from = of_groups[0].at + rows * to.pitch;
      const bool apart = to.added && to.added != to.to;
      for (int64_t row = 0; row < rows; ++row) {
        __builtin_prefetch(to.to + from + row * to.pitch, 1);
        if (apart) __builtin_prefetch(to.added + from + row * to.pitch);
      }
    }

    __m512 first(int vector) const { return _mm512_loadu_ps(to.bias + vector * kLanes); }

    template <int kMany, int kVectors>
    void take(const __m512 (&sum)[kMany * kRows][kVectors]) const {
      to.added ? put<true, kMany>(sum) : put<false, kMany>(sum);
    }

    // What it reads of `to` is read before the first store, which might be to it for all the compiler knows.
    template <bool kAdds, int kMany, int kVectors>
    void put(const __m512 (&sum)[kMany * kRows][kVectors]) const {
      const Finished f = to;
      const __m512 least = _mm512_set1_ps(f.rectified ? 0.f : -INFINITY);
#pragma GCC unroll 8
      for (int g = 0; g < kMany; ++g) {
        const GroupOutputs outputs = of_groups[g];
#pragma GCC unroll 8
        for (int row = 0; row < kRows; ++row) {
          if (row >= outputs.count) break;
          const int64_t at = outputs.at + row * f.pitch;
          __m512 value[kVectors];
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            value[v] = sum[g * kRows + row][v];
            if (kAdds) value[v] = _mm512_add_ps(value[v], (__m512)load(f.added + at + v * kLanes, kLanes));
            value[v] = _mm512_max_ps(least, value[v]);  // of NaN and a number the second operand
          }
          if constexpr (kVectors == 2) {
            _mm512_storeu_si512(f.to + at, (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]));
          } else {
            _mm256_storeu_si256((__m256i*)(f.to + at), (__m256i)_mm512_cvtneps_pbh(value[0]));
          }
        }
      }
    }
  };

  template <class To>
  static void multiply_to(const Product& p, const char* const* a, int64_t groups, const char* b, int64_t vectors, const To& to) {
    using Tile = void (*)(const Product&, const char* const*, const char*, const To&);
    static constexpr Tile kOne[6] = {tile<1, 1, To>, tile<2, 1, To>, tile<3, 1, To>, tile<std::min<int>(4, kMostGroups), 1, To>,
                                     tile<std::min<int>(5, kMostGroups), 1, To>, tile<kMostGroups, 1, To>};
    static constexpr Tile kTwo[3] = {tile<1, 2, To>, tile<2, 2, To>, tile<kGroups, 2, To>};
    (vectors == 1 ? kOne : kTwo)[groups - 1](p, a, b, to);
  }

  template <int kMany, int kVectors, class To>
  static void tile(const Product& p, const char* const* a, const char* b, const To& to) {
    __m512 sum[kMany * kRows][kVectors];
#pragma GCC unroll 32
    for (int row = 0; row < kMany * kRows; ++row)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[row][v] = to.first(v);
    Following next = to.following();
    if (!To::kFollowing) to.expect(kMany * kRows);
    const int64_t one = p.pitch, three = 3 * one, five = 5 * one;
    const char* ahead = p.ahead;
    for (int64_t r = 0; r < p.count; ++r) {
      const char* in[kMany];
#pragma GCC unroll 8
      for (int g = 0; g < kMany; ++g) in[g] = a[g] + p.runs[r].a;
      const char* line = b + p.runs[r].b;
      for (int64_t pair = 0; pair < p.pairs; pair += 2) {  // a granule has an even number of them
        __builtin_prefetch(ahead, 0, 2);
        ahead += p.ahead_step;
        if constexpr (To::kFollowing) {
          __builtin_prefetch(next.to, 1);
          __builtin_prefetch(next.added);
          next.to += next.step, next.added += next.step;
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) __builtin_prefetch(line + kFarther + 64 * i);
#pragma GCC unroll 2
        for (int u = 0; u < 2; ++u, line += p.line) {
          __m512bh columns[kVectors];
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) columns[v] = (__m512bh)_mm512_load_si512(line + v * 64);
#pragma GCC unroll 8
          for (int g = 0; g < kMany; ++g) {
#pragma GCC unroll 8
            for (int row = 0; row < kRows; ++row) {
              const char* at[] = {in[g],           in[g] + one,  in[g] + 2 * one,   in[g] + three,
                                  in[g] + 4 * one, in[g] + five, in[g] + 2 * three};
              int both;
              std::memcpy(&both, at[row] + 4 * u, 4);
              const __m512bh value = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 2
              for (int v = 0; v < kVectors; ++v)
                sum[g * kRows + row][v] = _mm512_dpbf16_ps(sum[g * kRows + row][v], columns[v], value);
            }
          }
        }
#pragma GCC unroll 8
        for (int g = 0; g < kMany; ++g) {
          in[g] += 8;
          asm("" : "+r"(in[g]));  // so that the rows stay sums of few registers
        }
      }
    }
    to.template take<kMany>(sum);
  }
};

// AVX512-BF16 with A in lines of pairs, `pitch` bytes apart, a line each of 13 rows: few of 64, 128 and so on are left over.
struct Avx512LineTiles {
  static constexpr int64_t kGroup = 13, kGroups = 1, kGranule = 2;
  static void begin() {}
  static void end() {}

  // A group may have fewer rows: 4, 8 or 13 are summed; or 16 where there is one vector.
  static void multiply(const Product& p, const char* const* a, int64_t rows, const char* b, int64_t vectors, float* sums) {
    using Tile = void (*)(const Product&, const char*, const char*, float*);
    static constexpr Tile kOne[4] = {tile<4, 1>, tile<8, 1>, tile<13, 1>, tile<16, 1>};
    static constexpr Tile kTwo[3] = {tile<4, 2>, tile<8, 2>, tile<13, 2>};
    (vectors == 1 ? kOne : kTwo)[rows <= 4 ? 0 : rows <= 8 ? 1 : rows <= 13 ? 2 : 3](p, a[0], b, sums);
  }

 private:
  template <int kRows, int kVectors>
  static void tile(const Product& p, const char* a, const char* b, float* sums) {
    __m512 sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[row][v] = _mm512_setzero_ps();
    for (int64_t r = 0; r < p.count; ++r) {
      const char *in = a + p.runs[r].a, *line = b + p.runs[r].b;
      for (int64_t pair = 0; pair < p.pairs; ++pair, in += p.pitch, line += p.line) {
        __m512bh columns[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) columns[v] = (__m512bh)_mm512_load_si512(line + v * 64);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
          int both;
          std::memcpy(&both, in + 4 * row, 4);
          const __m512bh value = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sum[row][v] = _mm512_dpbf16_ps(sum[row][v], columns[v], value);
        }
      }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) _mm512_store_ps(sums + row * kColumns + v * kLanes, sum[row][v]);
  }
};
#endif

#if FASTRES_AMX
// AMX: 2 x 2 tiles of 16 x 16 sums, tiles 0 to 3, of two tiles of A and two of B.
struct AmxTiles {
  static constexpr int64_t kGroup = 16, kGroups = 2, kMostGroups = 2, kGranule = 32;
  static constexpr bool kFinishes = false;

  // The thread's configuration of tiles is ours from `begin` to `end`, then what it was: other libraries may rely on theirs.
  // The intrinsics do not tell the compiler which memory they read, so it is told here and in `tile`.
  __attribute__((target("amx-tile"))) static void begin() {
    static const Config ours = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_storeconfig(&before());
    asm volatile("" ::"r"(&ours) : "memory");
    _tile_loadconfig(&ours);
  }
  __attribute__((target("amx-tile"))) static void end() {
    asm volatile("" ::"r"(&before()) : "memory");
    if (before().palette) {
      _tile_loadconfig(&before());
    } else {
      _tile_release();
    }
  }

  static void multiply(const Product& p, const char* const* a, int64_t groups, const char* b, int64_t vectors, float* sums) {
    if (groups == 2) {
      vectors == 2 ? tile<true, true>(p, a, b, sums) : tile<true, false>(p, a, b, sums);
    } else {
      vectors == 2 ? tile<false, true>(p, a, b, sums) : tile<false, false>(p, a, b, sums);
    }
  }

  // Whether the CPU has the instructions and the system lets this process use them.
  static bool available() {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of the Linux kernel
    return (edx & kBf16) && (edx & kTile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64);

  static Config& before() {
    thread_local Config config{};
    return config;
  }

  template <bool kSecondRows, bool kSecondColumns>
  __attribute__((target("amx-tile,amx-bf16"))) static void tile(const Product& p, const char* const* a, const char* b,
                                                                float* sums) {
    asm volatile("" ::"r"(a), "r"(b) : "memory");
    _tile_zero(0);
    if (kSecondColumns) _tile_zero(1);
    if (kSecondRows) _tile_zero(2);
    if (kSecondRows && kSecondColumns) _tile_zero(3);
    for (int64_t r = 0; r < p.count; ++r) {
      const char* in = a[0] + p.runs[r].a;
      const char* second = kSecondRows ? a[1] + p.runs[r].a : nullptr;
      const char* line = b + p.runs[r].b;
      for (int64_t pair = 0; pair < p.pairs; pair += 16, in += 64, second += 64, line += 16 * p.line) {
        _tile_loadd(4, in, p.pitch);
        _tile_loadd(6, line, p.line);
        _tile_dpbf16ps(0, 4, 6);
        if (kSecondColumns) {
          _tile_loadd(7, line + 64, p.line);
          _tile_dpbf16ps(1, 4, 7);
        }
        if (kSecondRows) {
          _tile_loadd(5, second, p.pitch);
          _tile_dpbf16ps(2, 5, 6);
          if (kSecondColumns) _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    constexpr int64_t kPitch = 4 * kColumns;
    _tile_stored(0, sums, kPitch);
    if (kSecondColumns) _tile_stored(1, sums + kLanes, kPitch);
    if (kSecondRows) _tile_stored(2, sums + 16 * kColumns, kPitch);
    if (kSecondRows && kSecondColumns) _tile_stored(3, sums + 16 * kColumns + kLanes, kPitch);
    asm volatile("" ::"r"(sums) : "memory");
  }
};
#endif

enum Form { kPlain = 0, kAvx512 = 1, kAmx = 2 };

// The best form on this CPU.
inline Form best_form() {
#if FASTRES_AMX
  if (FASTRES_AVX512 && AmxTiles::available()) return kAmx;
#endif
  return FASTRES_AVX512 ? kAvx512 : kPlain;
}

}  // namespace fastres
