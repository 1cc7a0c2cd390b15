// What the task splitter (layer.cpp) and the kernels (kernel.cpp, once per instruction set) share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lpvit {

// Tokens are handed to a kernel in chunks of this many; every tile height divides it.
constexpr int64_t kChunk = 12;

enum Activation : int32_t { kNone = 0, kGelu = 1 };

// A vertical slice of one block row: `vectors` SIMD registers of outputs, all of its stored blocks.
struct Strip {
    const float* weights;   // per block, per column: vectors * lanes floats, padded with zeros
    const int32_t* columns; // first input feature of each stored block
    const float* bias;      // vectors * lanes floats, padded with zeros
    int32_t blocks;
    int32_t first_output;
    int32_t outputs; // how many of the vectors * lanes outputs exist
    int32_t vectors;
};

// Row-major X (tokens, x_stride) and Y (tokens, y_stride), float32.
struct Operands {
    const float* x;
    float* y;
    std::size_t x_stride;
    std::size_t y_stride;
};

struct Kernel {
    const char* name;
    int32_t lanes;
    int32_t widest; // vectors of the widest strip; narrower ones are powers of two below it
    // Computes tokens [first, last) of the strips of one block row, which share their columns.
    void (*run)(const Strip* strips, int32_t count, const Operands&, int64_t first, int64_t last,
                int32_t block_cols, Activation);
    // Multiply-adds on registers alone, to learn a core's peak; returns the operations done.
    int64_t (*fma_loop)(int64_t rounds);
};

// LPVIT_ONLY_PORTABLE is for tests that compile one kernel alone.
#if defined(LPVIT_ONLY_PORTABLE)
#elif defined(__x86_64__)
extern const Kernel avx512_kernel;
extern const Kernel avx2_kernel;
#elif defined(__aarch64__)
extern const Kernel neon_kernel;
#endif
extern const Kernel portable_kernel;

}  // namespace lpvit
