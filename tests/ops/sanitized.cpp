// Runs the compiled passes and convolutions over odd sizes on buffers of exactly their size, for the sanitizers to watch.
// Built by test_cpu_sanitizers.py with the sources of fastres/ops/cpu.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>

extern "C" {
int64_t fastres_form();
int64_t fastres_units(int64_t, const int64_t*, bool);
void fastres_unit_pixels(int64_t, const int64_t*, bool, float*);
int64_t fastres_packed_size(int64_t, const int64_t*, bool);
void fastres_pack(int64_t, const int64_t*, bool, const void*, bool, uint16_t*, int64_t);
void fastres_sgd(const int64_t*, int64_t, double, double, bool, double, double, int64_t);
void fastres_conv(int64_t, const int64_t*, const uint16_t*, const float*, bool, const uint16_t*, const float*, uint16_t*,
                  const uint16_t*, const uint16_t*, uint16_t*, float*, float*, int64_t);
void fastres_folded_conv(int64_t, const int64_t*, const uint16_t*, const uint16_t*, const float*, const uint16_t*, bool,
                         uint16_t*, int64_t);
void fastres_data_grad(int64_t, const int64_t*, const uint16_t*, const uint16_t*, const float*, const uint16_t*,
                       const uint16_t*, const uint16_t*, const float*, bool, const uint16_t*, const float*, uint16_t*, float*,
                       int64_t);
void fastres_weight_grad(int64_t, const int64_t*, const uint16_t*, const uint16_t*, const float*, const uint16_t*, const float*,
                         bool, float*, int64_t);
void fastres_moments_bfloat16(const uint16_t*, const uint16_t*, uint16_t*, int64_t, int64_t, int64_t, float*, float*, int64_t);
void fastres_normalise_bfloat16(const uint16_t*, const float*, const uint16_t*, const float*, int64_t, uint16_t*, int64_t,
                                int64_t, int64_t, int64_t);
void fastres_backward_sums_bfloat16(const uint16_t*, const uint16_t*, const uint16_t*, const float*, bool, const uint16_t*,
                                    const uint16_t*, const float*, const uint16_t*, const float*, uint16_t*, float*, float*,
                                    int64_t, int64_t,
                                    int64_t, int64_t);
void fastres_backward_apply_bfloat16(const uint16_t*, const uint16_t*, const float*, const uint16_t*, uint16_t*, int64_t,
                                     int64_t, int64_t, int64_t);
void fastres_max_pool_bfloat16(const uint16_t*, const float*, int64_t, const int64_t*, uint16_t*, uint8_t*, int64_t);
void fastres_plain_max_pool_bfloat16(const uint16_t*, const int64_t*, uint16_t*, int64_t);
void fastres_plain_max_pool_float32(const float*, const int64_t*, float*, int64_t);
void fastres_max_pool_backward_bfloat16(const uint16_t*, const uint8_t*, const int64_t*, uint16_t*, int64_t);
void fastres_normalise_apart_bfloat16(const uint16_t*, const float*, const uint16_t*, const int64_t*, bool, uint16_t*, int64_t);
void fastres_add_apart_bfloat16(const uint16_t*, const int64_t*, uint16_t*, int64_t);
void fastres_running_coef(const float*, const float*, const float*, const float*, double, int64_t, float*);
void fastres_backward_coef_slots(const int64_t*);
void fastres_normalise_bfloat16_slots(const int64_t*);
void fastres_program(const int64_t*, int64_t, const int64_t*);
void fastres_finalize(const float*, const float*, const float*, const float*, const float*, double, int64_t, int64_t, float*);
void fastres_backward_coef(const float*, const float*, int64_t, int64_t, double, bool, float*, float*, float*);
}

namespace {

std::mt19937 engine(1);
double checksum = 0;
int64_t missing = 0;  // elements that the output lacks: the sanitizers must notice

// Memory of its own, so that every byte beyond it is watched.
template <typename T>
std::unique_ptr<T[]> made(int64_t size) {
  std::unique_ptr<T[]> memory(new T[size]);
  std::uniform_real_distribution<float> values(-1, 1);
  for (int64_t i = 0; i < size; ++i) {
    const float value = values(engine);
    if constexpr (sizeof(T) == 2) {
      uint32_t bits;
      __builtin_memcpy(&bits, &value, 4);
      memory[i] = T(bits >> 16);
    } else {
      memory[i] = T(value);
    }
  }
  return memory;
}

void add(const float* values, int64_t size) {
  for (int64_t i = 0; i < size; ++i) checksum += values[i];
}

void convolve(int64_t form, int64_t n, int64_t height, int64_t width, int64_t c, int64_t k, int64_t kernel, int64_t stride,
              int64_t pad, int64_t dilation, int64_t threads) {
  const int64_t reach = (kernel - 1) * dilation + 1;
  const int64_t out_height = (height + 2 * pad - reach) / stride + 1, out_width = (width + 2 * pad - reach) / stride + 1;
  const int64_t sizes[] = {n, height, width, c, out_height, out_width, k, kernel, kernel, stride, pad, pad, dilation};
  const int64_t in = n * height * width * c, out = n * out_height * out_width * k;
  const auto x = made<uint16_t>(in), w = made<uint16_t>(k * kernel * kernel * c), residual = made<uint16_t>(out);
  const auto coef = made<float>(5 * c), bias = made<float>(k), abc = made<float>(3 * k);
  const auto packed = made<uint16_t>(fastres_packed_size(form, sizes, false));
  fastres_pack(form, sizes, false, w.get(), false, packed.get(), threads);
  const int64_t units = fastres_units(form, sizes, false);
  const auto count = made<float>(units), mean = made<float>(units * k), m2 = made<float>(units * k);
  fastres_unit_pixels(form, sizes, false, count.get());
  const auto y = made<uint16_t>(out - missing);
  for (bool gelu : {false, true}) {
    fastres_conv(form, sizes, x.get(), coef.get(), gelu, nullptr, nullptr, nullptr, packed.get(), residual.get(), y.get(),
                 mean.get(), m2.get(), threads);
  }
  add(mean.get(), units * k), add(m2.get(), units * k), add(count.get(), units);
  if (kernel == 1 && stride == 1 && pad == 0) {
    const auto shortcut = made<uint16_t>(in), end = made<uint16_t>(in);
    fastres_conv(form, sizes, x.get(), coef.get(), false, shortcut.get(), coef.get(), end.get(), packed.get(), nullptr,
                 y.get(), mean.get(), m2.get(), threads);
  }
  fastres_folded_conv(form, sizes, x.get(), packed.get(), bias.get(), residual.get(), true, y.get(), threads);
  const auto transposed = made<uint16_t>(fastres_packed_size(form, sizes, true));
  const auto single = made<float>(k * kernel * kernel * c);  // packed with a rounding, then the weights that count
  fastres_pack(form, sizes, true, single.get(), true, transposed.get(), threads);
  fastres_pack(form, sizes, false, single.get(), true, packed.get(), threads);
  fastres_pack(form, sizes, true, w.get(), false, transposed.get(), threads);
  const int64_t dx_units = fastres_units(form, sizes, true);
  const auto sums = made<float>(dx_units * 2 * c), dw = made<float>(k * kernel * kernel * c);
  const auto dz = made<uint16_t>(out), dx = made<uint16_t>(in);
  for (bool gelu : {false, true}) {
    fastres_data_grad(form, sizes, dz.get(), y.get(), abc.get(), transposed.get(), dx.get(), x.get(), coef.get(), gelu, x.get(),
                      coef.get(), dx.get(), sums.get(), threads);
    fastres_weight_grad(form, sizes, dz.get(), y.get(), abc.get(), x.get(), coef.get(), gelu, dw.get(), threads);
  }
  fastres_weight_grad(form, sizes, dz.get(), y.get(), abc.get(), x.get(), nullptr, false, dw.get(), threads);
  add(dw.get(), k * kernel * kernel * c);
  fastres_data_grad(form, sizes, dz.get(), nullptr, nullptr, transposed.get(), nullptr, nullptr, nullptr, false, nullptr,
                    nullptr, dx.get(), nullptr, threads);
  add(sums.get(), dx_units * 2 * c), add(dw.get(), k * kernel * kernel * c);
}

// Two calls by a program, the second reading what the first wrote to the shared memory.
void program(int64_t c, int64_t blocks, int64_t m, int64_t rows, int64_t threads) {
  const auto sums = made<float>(blocks * 2 * c), coef = made<float>(5 * c), grads = made<float>(2 * c);
  const auto y = made<uint16_t>(m * c), out = made<uint16_t>(m * c);
  const auto memory = made<float>(5 * c);
  double pixels = double(m);
  int64_t pixels_slot;
  __builtin_memcpy(&pixels_slot, &pixels, 8);
  const int64_t bases[] = {int64_t(sums.get()), int64_t(coef.get()), int64_t(grads.get()), int64_t(y.get()), int64_t(out.get()),
                           int64_t(memory.get())};
  const int64_t code[] = {
      int64_t(fastres_backward_coef_slots), 9, 0, 0, 1, 0, -1, blocks, -1, c, -1, pixels_slot, -1, 1, 5, 0, 2, 0, 2, 4 * c,
      int64_t(fastres_normalise_bfloat16_slots), 10, 3, 0, 1, 0, -1, 0, -1, 0, -1, 1, 4, 0, -1, m, -1, c, -1, rows, -1, threads};
  fastres_program(code, sizeof code / sizeof *code, bases);
  add(grads.get(), 2 * c), add(memory.get(), 3 * c);
}

// A step of SGD of two tensors, the second one's first.
void descend(int64_t size, int64_t threads) {
  const auto weight = made<float>(size), grad = made<float>(size), buffer = made<float>(size), second = made<float>(3);
  const auto empty = made<float>(3);
  for (float* momentum : {buffer.get(), static_cast<float*>(nullptr)}) {
    const int64_t table[] = {int64_t(weight.get()), int64_t(grad.get()), int64_t(momentum), size, 0,
                             int64_t(second.get()), int64_t(grad.get()), int64_t(momentum ? empty.get() : nullptr), 3, 1};
    for (bool nesterov : {false, true}) fastres_sgd(table, 2, 0.1, 0.9, nesterov, 0.99, 0.01, threads);
  }
  add(weight.get(), size), add(second.get(), 3), add(empty.get(), 3);
}

void pass(int64_t n, int64_t height, int64_t width, int64_t c, int64_t rows, int64_t threads) {
  const int64_t m = n * height * width, size = m * c, blocks = (m + rows - 1) / rows;
  const auto y = made<uint16_t>(size), other = made<uint16_t>(size), out = made<uint16_t>(size);
  const auto coef = made<float>(5 * c), mean = made<float>(blocks * c), m2 = made<float>(blocks * c);
  const auto sums = made<float>(blocks * 2 * c), second = made<float>(blocks * 2 * c), count = made<float>(blocks);
  const auto abc = made<float>(3 * c), dgamma = made<float>(c), dbeta = made<float>(c);
  fastres_moments_bfloat16(y.get(), other.get(), out.get(), m, c, rows, mean.get(), m2.get(), threads);
  for (int64_t i = 0; i < blocks; ++i) count[i] = 1;
  fastres_finalize(count.get(), mean.get(), m2.get(), nullptr, nullptr, 1e-5, blocks, c, coef.get());
  for (int64_t act : {0, 1, 2}) {
    fastres_normalise_bfloat16(y.get(), coef.get(), other.get(), coef.get(), act, out.get(), m, c, rows, threads);
  }
  for (bool gelu : {false, true}) {
    fastres_backward_sums_bfloat16(y.get(), other.get(), out.get(), coef.get(), gelu, nullptr, y.get(), coef.get(),
                                   other.get(), coef.get(), out.get(), sums.get(), second.get(), m, c, rows, threads);
    fastres_backward_sums_bfloat16(y.get(), nullptr, y.get(), coef.get(), gelu, other.get(), y.get(), coef.get(), nullptr,
                                   nullptr, out.get(), sums.get(), nullptr, m, c, rows, threads);
  }
  fastres_backward_coef(sums.get(), coef.get(), blocks, c, double(m), true, abc.get(), dgamma.get(), dbeta.get());
  fastres_backward_apply_bfloat16(y.get(), other.get(), abc.get(), out.get(), out.get(), m, c, rows, threads);
  const int64_t out_height = (height - 1) / 2 + 1, out_width = (width - 1) / 2 + 1;
  const int64_t window[] = {n, height, width, c, out_height, out_width, 3, 2, 1, 1};
  const auto pooled = made<uint16_t>(n * out_height * out_width * c);
  const std::unique_ptr<uint8_t[]> index(new uint8_t[n * out_height * out_width * c]);
  for (int64_t act : {1, 2}) fastres_max_pool_bfloat16(y.get(), coef.get(), act, window, pooled.get(), index.get(), threads);
  fastres_plain_max_pool_bfloat16(y.get(), window, pooled.get(), threads);
  const auto floats = made<float>(size), pooled_floats = made<float>(n * out_height * out_width * c);
  fastres_plain_max_pool_float32(floats.get(), window, pooled_floats.get(), threads);
  fastres_max_pool_backward_bfloat16(pooled.get(), index.get(), window, out.get(), threads);
  // every second pixel of it, with fewer and with more channels
  for (int64_t narrow : {c - 3, c + 2}) {
    const int64_t sizes[] = {n, height, width, c, out_height, out_width, narrow, 2};
    const auto thin = made<uint16_t>(n * out_height * out_width * narrow);
    const auto ended = made<uint16_t>(n * out_height * out_width * narrow);
    const auto its_coef = made<float>(5 * narrow);
    fastres_normalise_apart_bfloat16(thin.get(), its_coef.get(), y.get(), sizes, true, ended.get(), threads);
    fastres_add_apart_bfloat16(ended.get(), sizes, out.get(), threads);
  }
  fastres_running_coef(mean.get(), count.get(), dgamma.get(), nullptr, 1e-5, std::min(c, blocks), coef.get());
  program(c, blocks, m, rows, threads);
  add(dgamma.get(), c);
}

}  // namespace

int main(int count, char**) {
  missing = count - 1;
  for (int64_t form = 0; form <= fastres_form(); ++form)
    for (int64_t threads : {1, 3}) {
      convolve(form, 3, 7, 9, 17, 33, 3, 1, 1, 1, threads);
      convolve(form, 2, 16, 16, 40, 24, 3, 1, 1, 1, threads);
      convolve(form, 1, 13, 11, 3, 16, 5, 2, 2, 1, threads);
      convolve(form, 5, 4, 4, 64, 70, 3, 2, 1, 1, threads);
      convolve(form, 3, 14, 14, 20, 12, 3, 1, 2, 2, threads);
      convolve(form, 3, 9, 11, 50, 30, 1, 1, 0, 1, threads);
      convolve(form, 3, 9, 11, 50, 48, 1, 1, 0, 1, threads);   // finished in registers
      convolve(form, 1, 1, 1, 5, 2, 1, 1, 0, 1, threads);
      convolve(form, 2, 9, 12, 33, 65, 1, 3, 0, 1, threads);
      convolve(form, 2, 40, 38, 96, 16, 3, 1, 1, 1, threads);  // several units of rows
      convolve(form, 3, 9, 16, 16, 13, 3, 1, 1, 1, threads);   // one vector of channels
      pass(3, 5, 7, 19, 8, threads);
      descend(37, threads);
    }
  std::printf("done %d\n", std::isfinite(checksum));
}
