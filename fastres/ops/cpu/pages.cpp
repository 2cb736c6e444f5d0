// PyTorch's CPU allocator with `Pages` for large tensors; small ones stay the C library's.
#include "pages.h"

#include <c10/core/CPUAllocator.h>
#include <pthread.h>

namespace {

constexpr size_t LARGE = 1 << 20;  // bytes

fastres::Pages& pages() {
    static fastres::Pages* only = new fastres::Pages;  // outlives every tensor
    return *only;
}

c10::Allocator* small() {
    static c10::Allocator* only = c10::GetDefaultCPUAllocator();
    return only;
}

// PyTorch also frees by the address alone, so there is one function for both kinds.
void release(void* memory) {
    if (pages().free(memory)) {
        c10::profiledCPUMemoryReporter().Delete(memory);
    } else {
        small()->raw_deallocate(memory);
    }
}

class Allocator final : public c10::Allocator {
   public:
    c10::DataPtr allocate(size_t bytes) override {
        void* memory = bytes >= LARGE ? pages().allocate(bytes) : nullptr;
        if (memory != nullptr) {
            c10::profiledCPUMemoryReporter().New(memory, bytes);
        } else {
            memory = small()->raw_allocate(bytes);  // which raises where there is none
        }
        return {memory, memory, &release, c10::Device(c10::DeviceType::CPU)};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &release; }

    void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

extern "C" {

// Have PyTorch take large tensors' memory from here, from now on; once.
void fastres_use_pages() {
    // A child of a fork must not find the lock taken by a thread that it has not.
    pthread_atfork([] { pages().mutex().lock(); }, [] { pages().mutex().unlock(); }, [] { pages().mutex().unlock(); });
    c10::SetCPUAllocator(new Allocator, 0);
}

// Give back to the system what is free.
void fastres_release_pages() { pages().release(); }

// Bytes that are in use, and those that are free.
void fastres_pages_held(int64_t* in_use, int64_t* free) {
    const auto [used, left] = pages().held();
    *in_use = static_cast<int64_t>(used);
    *free = static_cast<int64_t>(left);
}
}
