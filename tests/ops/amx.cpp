// AMX for processors without it: a handler of the signal that an unknown instruction raises computes what the instruction
// would have, so that the AMX form of tiles runs as it was compiled, thousands of times slower.
//
// Encodings and results are those of Intel's manual (Software Developer's Manual, volume 2, "TDPBF16PS" and others): VEX with
// three bytes of prefix, map 0F38. Tiles that are used without a configuration, beyond it or with other sizes than belong
// together are illegal instructions to it, too, and go to the handler of before.
#include <signal.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct alignas(64) Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct State {
  Config config{};
  uint8_t tiles[8][16][64]{};
};

struct sigaction before;
int64_t computed = 0;

State& state() {
  thread_local State of_thread;
  return of_thread;
}

// Of an instruction: its operands and its length.
struct Decoded {
  int opcode, prefix, reg, rm, vvvv;
  bool memory;
  char* address;
  int64_t stride;
  int64_t length;
};

int64_t& of(ucontext_t* context, int number) {
  static constexpr int kPlaces[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                      REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return reinterpret_cast<int64_t&>(context->uc_mcontext.gregs[kPlaces[number]]);
}

bool decode(ucontext_t* context, Decoded* d) {
  const uint8_t* code = reinterpret_cast<const uint8_t*>(context->uc_mcontext.gregs[REG_RIP]);
  if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || code[2] & 0x84) return false;  // VEX, 0F38; W 0, 128 bits
  const int x = !(code[1] & 0x40), b = !(code[1] & 0x20);
  const int modrm = code[4], mod = modrm >> 6;
  *d = {code[3], code[2] & 3, modrm >> 3 & 7, modrm & 7, ~code[2] >> 3 & 15, mod != 3, nullptr, 0, 5};
  if (!d->memory) return true;
  int64_t base = 0;
  bool relative = false, wide = mod == 2;
  if (d->rm == 4) {
    const int sib = code[5], index = (sib >> 3 & 7) | x << 3, base_number = sib & 7;
    d->length = 6;
    if (index != 4) d->stride = of(context, index) << (sib >> 6);
    if (base_number == 5 && mod == 0) {
      wide = true;
    } else {
      base = of(context, base_number | b << 3);
    }
  } else if (d->rm == 5 && mod == 0) {
    relative = wide = true;
  } else {
    base = of(context, d->rm | b << 3);
  }
  if (wide) {
    int32_t displacement;
    std::memcpy(&displacement, code + d->length, 4);
    base += displacement;
    d->length += 4;
  } else if (mod == 1) {
    base += static_cast<int8_t>(code[d->length]);
    d->length += 1;
  }
  if (relative) base += context->uc_mcontext.gregs[REG_RIP] + d->length;
  d->address = reinterpret_cast<char*>(base);
  return true;
}

bool is_set_up(int tile) {
  const Config& config = state().config;
  return config.palette == 1 && config.rows[tile] > 0 && config.row_bytes[tile] > 0;
}

bool load_config(const char* from) {
  Config config;
  std::memcpy(&config, from, sizeof config);
  if (config.palette > 1) return false;
  for (const uint8_t byte : config.reserved)
    if (byte) return false;
  for (int tile = 0; tile < 16; ++tile)
    if (config.row_bytes[tile] > (tile < 8 ? 64 : 0) || config.rows[tile] > (tile < 8 ? 16 : 0)) return false;
  State& now = state();
  now = State{};
  if (config.palette) now.config = config;
  return true;
}

float widened(const uint8_t* at) {
  uint16_t half;
  std::memcpy(&half, at, 2);
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

float flushed(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value; }

// The sums of c += a * b: even and odd terms of a row apart, then both together.
bool multiply(int c, int a, int b) {
  State& now = state();
  const Config& config = now.config;
  if (c == a || c == b || a == b || !is_set_up(a) || !is_set_up(b) || !is_set_up(c)) return false;
  const int rows = config.rows[c], columns = config.row_bytes[c] / 4, pairs = config.row_bytes[a] / 4;
  if (config.rows[a] != rows || config.row_bytes[b] != config.row_bytes[c] || config.rows[b] != pairs) return false;
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < pairs; ++k) {
        even = flushed(even + widened(&now.tiles[a][m][4 * k]) * widened(&now.tiles[b][k][4 * n]));
        odd = flushed(odd + widened(&now.tiles[a][m][4 * k + 2]) * widened(&now.tiles[b][k][4 * n + 2]));
      }
      std::memcpy(&sum, &now.tiles[c][m][4 * n], 4);
      sum = flushed(sum + flushed(even + odd));
      std::memcpy(&now.tiles[c][m][4 * n], &sum, 4);
    }
  return true;
}

bool compute(const Decoded& d) {
  enum { kNone, k66, kF3, kF2 };
  State& now = state();
  if (d.opcode == 0x49 && d.prefix == kNone && d.memory && d.reg == 0) return load_config(d.address);
  if (d.opcode == 0x49 && d.prefix == kNone && !d.memory) return now = State{}, true;  // TILERELEASE
  if (d.opcode == 0x49 && d.prefix == k66 && d.memory) return std::memcpy(d.address, &now.config, sizeof(Config)), true;
  if (d.opcode == 0x49 && d.prefix == kF2 && !d.memory) {  // TILEZERO
    if (!is_set_up(d.reg)) return false;
    return std::memset(now.tiles[d.reg], 0, sizeof now.tiles[0]), true;
  }
  if (d.opcode == 0x4B && d.memory && d.rm == 4 && d.prefix != kNone) {
    if (!is_set_up(d.reg)) return false;
    const int bytes = now.config.row_bytes[d.reg], rows = now.config.rows[d.reg];
    if (d.prefix != kF3) std::memset(now.tiles[d.reg], 0, sizeof now.tiles[0]);
    for (int row = 0; row < rows; ++row) {
      char* const at = d.address + row * d.stride;
      d.prefix == kF3 ? std::memcpy(at, now.tiles[d.reg][row], bytes) : std::memcpy(now.tiles[d.reg][row], at, bytes);
    }
    return true;
  }
  return d.opcode == 0x5C && d.prefix == kF3 && !d.memory && multiply(d.reg, d.rm, d.vvvv);
}

void handle(int signal, siginfo_t* information, void* raw) {
  ucontext_t* const context = static_cast<ucontext_t*>(raw);
  Decoded decoded;
  if (decode(context, &decoded) && compute(decoded)) {
    context->uc_mcontext.gregs[REG_RIP] += decoded.length;
    __atomic_fetch_add(&computed, 1, __ATOMIC_RELAXED);
    return;
  }
  if (before.sa_flags & SA_SIGINFO) return before.sa_sigaction(signal, information, raw);
  if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) return before.sa_handler(signal);
  sigaction(signal, &before, nullptr);  // the instruction raises it again
}

}  // namespace

// Takes the signal; returns 0 if the system lets it.
extern "C" int take_amx() {
  struct sigaction ours{};
  ours.sa_sigaction = handle;
  ours.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGILL, &ours, &before);
}

// Gives it back.
extern "C" int give_amx_back() { return sigaction(SIGILL, &before, nullptr); }

// How many instructions were computed.
extern "C" int64_t computed_amx() { return __atomic_load_n(&computed, __ATOMIC_RELAXED); }
