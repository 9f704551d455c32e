// What CUDA's language adds to C++, for a kernel that a host's compiler is to take: every block is carried out by
// fibers, one for each of its threads, which take turns wherever threads of a device meet.
// Only what the project's kernels use is here. tests/support/host_cuda.py puts it before a kernel's text.
#pragma once
#define CUDA_ON_HOST

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)

using std::min;

namespace host {

struct Index {
    int x = 0, y = 0, z = 0;
};

constexpr int WARP = 32;
constexpr size_t STACK = 64 << 10;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
};

// One block at a time.
struct Block {
    ucontext_t caller;
    std::vector<Fiber> fibers;
    std::vector<float> given;  // by each thread, to those of its warp
    std::function<void()> work;
    int now = 0;
};

inline Block* block = nullptr;

inline void run_fiber() {
    block->work();
    block->fibers[block->now].done = true;
}

}  // namespace host

inline host::Index threadIdx, blockIdx, blockDim, gridDim;

namespace host {

// Until every other thread of the block that is not done has come as far.
inline void meet() {
    swapcontext(&block->fibers[block->now].context, &block->caller);
    threadIdx.x = block->now;
}

template <class Work>
void launch(int blocks, int threads, Work work) {
    Block all;
    block = &all;
    all.work = work;
    all.given.resize(threads);
    gridDim.x = blocks, blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        all.fibers = std::vector<Fiber>(threads);
        for (Fiber& fiber : all.fibers) {
            fiber.stack.resize(STACK);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = STACK;
            fiber.context.uc_link = &all.caller;
            makecontext(&fiber.context, run_fiber, 0);
        }
        for (bool left = true; left;) {
            left = false;
            for (all.now = 0; all.now < threads; ++all.now) {
                if (all.fibers[all.now].done) continue;
                threadIdx.x = all.now;
                swapcontext(&all.caller, &all.fibers[all.now].context);
                left |= !all.fibers[all.now].done;
            }
        }
    }
}

inline float half_to_float(uint16_t bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return value;
}

inline uint16_t float_to_half(float value) {
    const _Float16 half = value;
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

}  // namespace host

inline float wide_half(unsigned short bits) { return host::half_to_float(bits); }
inline unsigned short narrow_half(float value) { return host::float_to_half(value); }

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// Byte i of the result is the one that digit i of ``which`` names: 0 to 3 of low, 4 to 7 of high.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned which) {
    const uint64_t both = (uint64_t)high << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= (unsigned)(both >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
    return result;
}

// The whole warp must come here; the one who reads has not been asked for its next value yet.
inline float __shfl_xor_sync(unsigned, float value, int apart) {
    const int own = threadIdx.x, other = own ^ apart;
    host::block->given[own] = value;
    host::meet();
    const float theirs = host::block->given[other];
    host::meet();
    return theirs;
}
