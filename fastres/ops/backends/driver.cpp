// Launches of kernels that are compiled and loaded, one after the other, straight through the CUDA driver.

#include <cstdint>

namespace {

constexpr int MOST_PARAMETERS = 128;

// cuda.h's CUlaunchAttribute and CUlaunchConfig.
struct Attribute {
  int id;
  union {
    int allowed;
    uint64_t all[8];
  } value;
};
constexpr int PROGRAMMATIC_STREAM_SERIALIZATION = 6;

struct Config {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  const Attribute* attributes;
  unsigned count;
};

// Functions of libcuda.so.1 as cuda.h declares them: CUresult is an int, the handles are pointers.
struct Driver {
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra);
  int (*launch_with)(const Config* config, void* function, void** parameters, void** extra);
  int (*current_context)(void** context);
  int (*device)(int* device, int ordinal);
  int (*primary_context)(void** context, int device);
  int (*make_current)(void* context);
};

struct Launch {
  void* function;
  uint32_t grid[3];
  uint32_t threads, shared_bytes;
  uint32_t dependent;  // whether it waits for the kernel before it by itself, see fastres/kernels/dependent.py
  uint32_t first, last;  // of its parameters, behind the last
};

// What a kernel is given: `value`, or the address that many bytes behind a base. The driver reads as many of the low
// bytes as the parameter has, which are the first ones in memory: x86-64 and AArch64 are little-endian.
struct Parameter {
  int64_t base;  // -1: none
  uint64_t value;
};

int launch(const Driver& driver, const Launch& one, void* stream, void** parameters) {
  const uint32_t* const grid = one.grid;
  if (!one.dependent)
    return driver.launch(one.function, grid[0], grid[1], grid[2], one.threads, 1, 1, one.shared_bytes, stream, parameters,
                         nullptr);
  Attribute attribute{PROGRAMMATIC_STREAM_SERIALIZATION, {1}};
  const Config config{{grid[0], grid[1], grid[2]}, {one.threads, 1, 1}, one.shared_bytes, stream, &attribute, 1};
  return driver.launch_with(&config, one.function, parameters, nullptr);
}

// PyTorch's threads for the backward pass may not have touched the device's context yet.
int ensure_context(const Driver& driver, int ordinal) {
  void* context = nullptr;
  int error = driver.current_context(&context), device = 0;
  if (error || context) return error;
  if ((error = driver.device(&device, ordinal))) return error;
  if ((error = driver.primary_context(&context, device))) return error;
  return driver.make_current(context);
}

static_assert(sizeof(Attribute) == 72 && sizeof(Config) == 56);

}  // namespace

extern "C" int64_t fastres_most_parameters() { return MOST_PARAMETERS; }

// Returns the driver's error, 0: none; `place` is then where the launch stands that failed.
extern "C" int64_t fastres_launch(const Driver* driver, const Launch* launches, const Parameter* parameters,
                                  const uint64_t* bases, void* stream, int64_t ordinal, int64_t begin, int64_t end,
                                  int64_t* place) {
  *place = begin;
  if (int error = ensure_context(*driver, static_cast<int>(ordinal))) return error;
  for (; *place < end; ++*place) {
    const Launch& one = launches[*place];
    if (uint64_t(one.grid[0]) * one.grid[1] * one.grid[2] == 0) continue;
    uint64_t values[MOST_PARAMETERS];
    void* pointers[MOST_PARAMETERS];
    for (uint32_t i = one.first; i < one.last; ++i) {
      const Parameter& given = parameters[i];
      values[i - one.first] = given.value + (given.base < 0 ? 0 : bases[given.base]);
      pointers[i - one.first] = &values[i - one.first];
    }
    if (int error = launch(*driver, one, stream, pointers)) return error;
  }
  return 0;
}
