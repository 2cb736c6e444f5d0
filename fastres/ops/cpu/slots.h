// Functions whose arguments stand in slots of 8 bytes each, so that a program can call them all alike, see program.cpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace fastres {

// An argument from its slot: a pointer, an int64, a bool, or the bits of a double.
template <typename T>
inline T from_slot(int64_t slot) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(slot);
  } else if constexpr (std::is_floating_point_v<T>) {
    static_assert(sizeof(T) == sizeof slot);
    T value;
    std::memcpy(&value, &slot, sizeof value);
    return value;
  } else {
    return T(slot);
  }
}

template <typename... Arguments, size_t... kIndices>
inline void call_with(void (*function)(Arguments...), const int64_t* slots, std::index_sequence<kIndices...>) {
  function(from_slot<Arguments>(slots[kIndices])...);
}

template <typename... Arguments>
inline void call_with_slots(void (*function)(Arguments...), const int64_t* slots) {
  call_with(function, slots, std::index_sequence_for<Arguments...>());
}

}  // namespace fastres

// fastres_NAME_slots, which calls fastres_NAME.
#define FASTRES_SLOTS(NAME) \
  extern "C" void fastres_##NAME##_slots(const int64_t* slots) { fastres::call_with_slots(fastres_##NAME, slots); }
