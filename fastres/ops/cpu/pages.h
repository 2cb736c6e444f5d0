// Memory that is kept when it is freed and given out again page by page, so that what is held is never more than what
// was once in use, whatever sizes follow one another: a buffer that no free stretch of addresses is long enough for gets
// new addresses, and the pages of several stretches are moved there (mremap), contents, faults and clearing saved.
// A memory allocator in the sense of Wilson et al. 1995, "Dynamic Storage Allocation: A Survey and Critical Review":
// best fit with immediate coalescing; moving pages stands where fragmentation would.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fastres {

class Pages {
   public:
    static constexpr size_t UNIT = 64 << 10;  // bytes; sizes are rounded up to it, so that stretches stay few

    // Memory of at least that many bytes, contents undefined; nullptr: the system has no more.
    void* allocate(size_t bytes) {
        bytes = (bytes + UNIT - 1) / UNIT * UNIT;
        std::lock_guard<std::mutex> lock(mutex_);
        Stretch found = take(bytes);
        if (found.empty()) return nullptr;
        char* at = found.front().at;
        used_ += bytes;
        taken_.emplace(at, std::move(found));
        return at;
    }

    // Whether it is memory of `allocate`, which is free now.
    bool free(void* memory) {
        if (reinterpret_cast<uintptr_t>(memory) % PAGE != 0) return false;
        std::lock_guard<std::mutex> lock(mutex_);
        const auto place = taken_.find(static_cast<char*>(memory));
        if (place == taken_.end()) return false;
        Stretch stretch = std::move(place->second);
        taken_.erase(place);
        const size_t bytes = size_of(stretch);
        used_ -= bytes;
        if (stretch.size() > 4 && bytes / stretch.size() < SMALL) {
            unmap(stretch);  // splinters: a process may have 65,530 mappings
        } else {
            put(std::move(stretch));
        }
        return true;
    }

    // Give all that is free back to the system.
    void release() {
        std::lock_guard<std::mutex> lock(mutex_);
        release_free();
    }

    // Bytes that are in use, and those that are free.
    std::pair<size_t, size_t> held() {
        std::lock_guard<std::mutex> lock(mutex_);
        return {used_, free_bytes_};
    }

    std::mutex& mutex() { return mutex_; }

   private:
    static constexpr size_t PAGE = 4096;  // bytes, or the system's are a multiple of it
    static constexpr size_t SMALL = 256 << 10;  // bytes of a mapping, on average, below which a stretch is splinters

    struct Piece {  // pages of one mapping of the kernel's, which alone can be moved at once
        char* at;
        size_t bytes;
        uint64_t mapping;
    };
    using Stretch = std::vector<Piece>;  // one behind the other

    static size_t size_of(const Stretch& stretch) {
        return static_cast<size_t>(stretch.back().at + stretch.back().bytes - stretch.front().at);
    }

    // The smallest free stretch that is long enough, cut to size; or new addresses for pages of the longest ones.
    Stretch take(size_t bytes) {
        const auto place = by_size_.lower_bound({bytes, nullptr});
        if (place != by_size_.end()) {
            Stretch stretch = remove(place->second);
            if (size_of(stretch) > bytes) put_apart(cut(stretch, bytes));
            return stretch;
        }
        char* at = map(bytes);
        if (at != nullptr && !by_size_.empty()) {
            Stretch stretch = gather(at, bytes);
            if (!stretch.empty()) return stretch;
            munmap(at, bytes);
            at = nullptr;
        }
        if (at == nullptr) {  // no memory, or more mappings than a process may have
            release_free();
            at = map(bytes);
        }
        return at == nullptr ? Stretch{} : Stretch{{at, bytes, ++mappings_}};
    }

    // Move free pages to fresh addresses until those, or the pages, end; nothing: the system refused.
    Stretch gather(char* at, size_t bytes) {
        Stretch stretch;
        size_t done = 0;
        while (done < bytes && !by_size_.empty()) {
            Stretch source = remove(std::prev(by_size_.end())->second);
            if (size_of(source) > bytes - done) put_apart(cut(source, bytes - done));
            for (const Piece& piece : source) {
                void* to = at + done;
                if (mremap(piece.at, piece.bytes, piece.bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) == MAP_FAILED) {
                    unmap(source);  // what was moved before is there no more, which is no error
                    return {};
                }
                stretch.push_back({at + done, piece.bytes, ++mappings_});
                done += piece.bytes;
            }
        }
        if (done < bytes) stretch.push_back({at + done, bytes - done, ++mappings_});
        return stretch;
    }

    // Fresh memory; nullptr: there is none.
    static char* map(size_t bytes) {
        constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
        return at == MAP_FAILED ? nullptr : static_cast<char*>(at);
    }

    // Shorten a stretch to that many bytes; the others.
    static Stretch cut(Stretch& stretch, size_t bytes) {
        Stretch rest;
        size_t before = 0;
        for (size_t i = 0; i < stretch.size(); ++i) {
            Piece& piece = stretch[i];
            if (before + piece.bytes > bytes) {
                const size_t kept = bytes - before;
                rest.push_back({piece.at + kept, piece.bytes - kept, piece.mapping});
                rest.insert(rest.end(), stretch.begin() + i + 1, stretch.end());
                piece.bytes = kept;
                stretch.resize(kept ? i + 1 : i);
                break;
            }
            before += piece.bytes;
        }
        return rest;
    }

    // Make a stretch free, joined with its free neighbours.
    void put(Stretch stretch) {
        auto next = free_.lower_bound(stretch.front().at);
        if (next != free_.end() && next->first == stretch.back().at + stretch.back().bytes) {
            Stretch behind = remove(next->first);
            join(stretch, behind);
        }
        next = free_.lower_bound(stretch.front().at);
        if (next != free_.begin()) {
            const Piece& last = std::prev(next)->second.back();
            if (last.at + last.bytes == stretch.front().at) {
                Stretch before = remove(std::prev(next)->first);
                join(before, stretch);
                stretch = std::move(before);
            }
        }
        put_apart(std::move(stretch));
    }

    static void join(Stretch& stretch, const Stretch& behind) {
        auto from = behind.begin();
        if (stretch.back().mapping == from->mapping) stretch.back().bytes += (from++)->bytes;
        stretch.insert(stretch.end(), from, behind.end());
    }

    void put_apart(Stretch stretch) {
        const size_t bytes = size_of(stretch);
        char* at = stretch.front().at;
        free_bytes_ += bytes;
        by_size_.emplace(bytes, at);
        free_.emplace(at, std::move(stretch));
    }

    Stretch remove(char* at) {
        const auto place = free_.find(at);
        Stretch stretch = std::move(place->second);
        free_.erase(place);
        by_size_.erase({size_of(stretch), at});
        free_bytes_ -= size_of(stretch);
        return stretch;
    }

    void release_free() {
        for (const auto& [at, stretch] : free_) unmap(stretch);
        free_.clear();
        by_size_.clear();
        free_bytes_ = 0;
    }

    static void unmap(const Stretch& stretch) { munmap(stretch.front().at, size_of(stretch)); }

    std::mutex mutex_;
    std::unordered_map<char*, Stretch> taken_;
    std::map<char*, Stretch> free_;
    std::set<std::pair<size_t, char*>> by_size_;
    size_t used_ = 0, free_bytes_ = 0;
    uint64_t mappings_ = 0;
};

}  // namespace fastres
