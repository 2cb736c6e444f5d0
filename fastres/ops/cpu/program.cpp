// Runs a list of calls that was recorded once, see program.py: with no Python between them.

#include <cstdint>

namespace {

constexpr int64_t kMostSlots = 24;

using Function = void (*)(const int64_t*);

}  // namespace

// For each call the program has a function with slots (slots.h), how many there are, and for each slot a base and a value:
// the value itself where the base is -1, else an address, `value` bytes behind bases[base].
extern "C" void fastres_program(const int64_t* program, int64_t size, const int64_t* bases) {
  for (const int64_t* const end = program + size; program < end;) {
    int64_t slots[kMostSlots];
    const Function function = reinterpret_cast<Function>(program[0]);
    const int64_t count = program[1];
    program += 2;
    for (int64_t i = 0; i < count; ++i, program += 2) slots[i] = program[0] < 0 ? program[1] : bases[program[0]] + program[1];
    function(slots);
  }
}
