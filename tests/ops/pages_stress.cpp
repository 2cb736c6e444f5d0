// Random buffers of `Pages`: contents stay, none overlaps another, and never more is held than was once in use.
#include "../../fastres/ops/cpu/pages.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

namespace {

struct Buffer {
    unsigned char* at;
    size_t bytes;
    unsigned char mark;
};

// One byte of each page, and the last one.
template <class Visit>
void each(const Buffer& buffer, Visit visit) {
    for (size_t i = 0; i < buffer.bytes; i += 4096) visit(buffer.at[i]);
    visit(buffer.at[buffer.bytes - 1]);
}

void check(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

void work(fastres::Pages& pages, unsigned seed, size_t largest, int steps) {
    std::mt19937 random(seed);
    std::vector<Buffer> buffers;
    for (int step = 0; step < steps; ++step) {
        if (buffers.size() < 24 && random() % 5 > 1) {
            const size_t bytes = 1 + random() % (random() % 4 ? largest / 8 : largest);
            Buffer made{static_cast<unsigned char*>(pages.allocate(bytes)), bytes, static_cast<unsigned char>(random())};
            check(made.at != nullptr, "no memory");
            each(made, [&](unsigned char& byte) { byte = made.mark; });
            buffers.push_back(made);
        } else if (!buffers.empty()) {
            std::swap(buffers[random() % buffers.size()], buffers.back());
            each(buffers.back(), [&](unsigned char& byte) { check(byte == buffers.back().mark, "contents"); });
            check(pages.free(buffers.back().at), "not known");
            buffers.pop_back();
        }
    }
    for (const Buffer& buffer : buffers) check(pages.free(buffer.at), "not known");
}

}  // namespace

int main() {
    for (unsigned seed = 0; seed < 4; ++seed) {  // sizes from splinters to what takes many stretches
        fastres::Pages pages;
        std::mt19937 random(seed);
        std::vector<std::pair<void*, size_t>> taken;
        size_t used = 0, most = 0;
        for (int step = 0; step < 3000; ++step) {
            if (random() % 2 && used < (size_t{64} << 20)) {
                const size_t units = 1 + random() % (seed % 2 ? 200 : 12);
                taken.emplace_back(pages.allocate(units * fastres::Pages::UNIT - random() % 1000), units);
                used += units * fastres::Pages::UNIT;
                most = std::max(most, used);
            } else if (!taken.empty()) {
                std::swap(taken[random() % taken.size()], taken.back());
                pages.free(taken.back().first);
                used -= taken.back().second * fastres::Pages::UNIT;
                taken.pop_back();
            }
            const auto [in_use, free] = pages.held();
            check(in_use == used, "in use");
            check(in_use + free <= most, "more is held than was in use");
        }
        for (const auto& one : taken) pages.free(one.first);
        pages.release();
        check(pages.held() == std::pair<size_t, size_t>{0, 0}, "held at the end");
        int other;
        check(!pages.free(&other) && !pages.free(nullptr), "what is not of it");
    }
    fastres::Pages pages;
    std::vector<std::thread> threads;
    for (unsigned seed = 0; seed < 4; ++seed) threads.emplace_back([&, seed] { work(pages, seed, 24 << 20, 1500); });
    for (std::thread& one : threads) one.join();
    check(pages.held().first == 0, "in use at the end");
    std::puts("done");
}
