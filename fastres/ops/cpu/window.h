// Windows over the pixels of NHWC tensors.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastres {

// As in `_window` of passes.py.
struct Window {
  int64_t n, height, width, c, out_height, out_width, kernel, stride, top, left;
};

inline Window window_of(const int64_t* sizes) {
  Window window;
  std::memcpy(&window, sizes, sizeof window);
  return window;
}

}  // namespace fastres
