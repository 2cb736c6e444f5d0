// A step of SGD with momentum over many tensors, in one pass over their memory. Products are rounded where they are in the vectors
// of PyTorch's fused step: the momentum's, and not what is written as fma.
#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace {

// What a tensor's step reads and writes: rows of the table, see sgd.py.
struct Parameter {
  float* weight;
  const float* grad;
  float* buffer;  // of the momentum; null: there is none
  int64_t size, first;  // whether the buffer is to be filled
};
static_assert(sizeof(Parameter) == 5 * sizeof(int64_t));

struct Rates {
  float lr, momentum, kept, coupled;  // `kept`: of a weight by the decoupled decay
};

enum class Momentum { kNone, kFirst, kPlain, kNesterov, kFirstNesterov };

template <Momentum kMomentum, bool kCoupled>
void step(float* __restrict weight, const float* __restrict grad, float* __restrict buffer, int64_t size, Rates r) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float before = weight[i], g = kCoupled ? std::fma(r.coupled, before, grad[i]) : grad[i];
    float move = g;
    if constexpr (kMomentum == Momentum::kFirst || kMomentum == Momentum::kFirstNesterov) buffer[i] = g;
    if constexpr (kMomentum == Momentum::kPlain || kMomentum == Momentum::kNesterov) {
      move = r.momentum * buffer[i] + g;
      buffer[i] = move;
    }
    if constexpr (kMomentum == Momentum::kNesterov || kMomentum == Momentum::kFirstNesterov) move = std::fma(r.momentum, move, g);
    weight[i] = std::fma(-r.lr, move, before * r.kept);
  }
}

void step_of(const Parameter& p, int64_t from, int64_t size, bool nesterov, Rates r) {
  const auto run = [&](auto kind) {
    const auto function = r.coupled == 0 ? step<kind, false> : step<kind, true>;
    function(p.weight + from, p.grad + from, p.buffer ? p.buffer + from : nullptr, size, r);
  };
  if (!p.buffer) return run(std::integral_constant<Momentum, Momentum::kNone>{});
  if (p.first) {
    return nesterov ? run(std::integral_constant<Momentum, Momentum::kFirstNesterov>{})
                    : run(std::integral_constant<Momentum, Momentum::kFirst>{});
  }
  return nesterov ? run(std::integral_constant<Momentum, Momentum::kNesterov>{})
                  : run(std::integral_constant<Momentum, Momentum::kPlain>{});
}

}  // namespace

// Threads take equal stretches of all elements, one tensor behind the other.
extern "C" void fastres_sgd(const int64_t* table, int64_t count, double lr, double momentum, bool nesterov, double kept,
                            double coupled, int64_t threads) {
  const Parameter* const parameters = reinterpret_cast<const Parameter*>(table);
  const Rates rates{float(lr), float(momentum), float(kept), float(coupled)};
  int64_t all = 0;
  for (int64_t i = 0; i < count; ++i) all += parameters[i].size;
#pragma omp parallel num_threads(int(threads))
  {
    const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t begin = all * thread / team, end = all * (thread + 1) / team;
    int64_t at = 0;
    for (int64_t i = 0; i < count && at < end; at += parameters[i++].size) {
      const int64_t from = std::max<int64_t>(begin - at, 0), to = std::min(end - at, parameters[i].size);
      if (from < to) step_of(parameters[i], from, to - from, nesterov, rates);
    }
  }
}
