// What the task splitter (layer.cpp) and the kernels (kernel.cpp, once per instruction set) share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lpvit {

// Tokens are handed to a kernel in chunks of this many; every tile height divides it.
constexpr int64_t kChunk = 12;

enum Activation : int32_t { kNone = 0, kGelu = 1 };

// Of the values of X and Y in memory.
enum Element : int32_t { kFloat32 = 0, kBfloat16 = 1 };

// A vertical slice of one block row: `vectors` SIMD registers of outputs, all of its stored blocks.
// A kernel with a preparation has steps in the place of blocks: `step` stored columns each.
struct Strip {
    const float* weights;   // per block, per column: vectors * lanes floats, padded with zeros; per
                            // step: as many words of `step` weights
    const int32_t* columns; // first input feature of each stored block; every feature of each step
    const float* bias;      // vectors * lanes floats, padded with zeros. For int8 weights as many
                            // scales and as many sums of weights, int32, follow
    int32_t blocks;
    int32_t first_output;
    int32_t outputs; // how many of the vectors * lanes outputs exist
    int32_t vectors;
};

// Row-major X (tokens, x_stride) and Y (tokens, y_stride), strides in elements.
struct Operands {
    const void* x;
    void* y;
    std::size_t x_stride;
    std::size_t y_stride;
    Element element; // kBfloat16 for avx512_bf16 alone
    void* prepared;  // X as `prepare` leaves it
    void* scratch;   // of one task
};

// What a kernel needs that does not read X as it lies. Memory is 64-byte aligned.
struct Preparation {
    std::size_t (*prepared_bytes)(int64_t tokens, int64_t features);
    std::size_t (*scratch_bytes)(int64_t steps);
    // Writes tokens [first, last) of X to `prepared`; first is a multiple of kChunk.
    void (*prepare)(const Operands&, int64_t tokens, int64_t features, int64_t first, int64_t last);
};

struct Kernel {
    const char* name;
    int32_t lanes;
    int32_t widest; // vectors of the widest strip; narrower ones are powers of two below it
    int32_t step;   // input features that one multiply-add takes, 32 bits of weights together
    // Computes tokens [first, last) of the strips of one block row, which share their columns.
    // `width` is that of a block, or, for a kernel with a preparation, of X.
    void (*run)(const Strip* strips, int32_t count, const Operands&, int64_t first, int64_t last,
                int32_t width, Activation);
    // Multiply-adds on registers alone, to learn a core's peak; returns the operations done.
    int64_t (*fma_loop)(int64_t rounds);
    const Preparation* preparation; // null: X is read as it lies
    int32_t weight_levels;          // largest int8 weight; 0: weights are not int8
};

// LPVIT_ONLY_PORTABLE is for tests that compile one kernel alone.
#if defined(LPVIT_ONLY_PORTABLE)
#elif defined(__x86_64__)
extern const Kernel avx512_bf16_kernel;
extern const Kernel avx512_vnni_kernel;
extern const Kernel avx2_int8_kernel;
extern const Kernel avx512_kernel;
extern const Kernel avx2_kernel;
#elif defined(__aarch64__)
extern const Kernel neon_kernel;
extern const Kernel neon_int8_kernel;
extern const Kernel neon_dotprod_kernel;
#endif
extern const Kernel portable_kernel;
extern const Kernel portable_int8_kernel;

}  // namespace lpvit
