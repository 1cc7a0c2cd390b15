// softmax(scale * Q K^T) V of one head, over the compiler's vector extensions and compiled once per
// instruction set like kernel.cpp, with the same three macros. The whole of one query tile's scores
// stays in the first-level cache between the two products, so they never go to memory.
#include "attention.h"
#include "softmax.h"

#define LPVIT_JOIN(a, b) a##b
#define LPVIT_SYMBOL(isa) LPVIT_JOIN(isa, _attention)
// Accumulators live in registers only if every loop over them is unrolled.
#define LPVIT_UNROLL _Pragma("GCC unroll 16")

namespace lpvit {
namespace {

constexpr int kRows = 6;  // queries of a tile: rows * widest accumulators fill the registers

// Keys of one head, transposed: (head_dim, padded tokens), so that neighbours are keys.
void transpose_keys(const Attention& a, int32_t head, float* keys) {
    const int64_t width = int64_t{a.heads} * a.head_dim, pitch = padded(a.tokens);
    const float* from = a.qkv + width + int64_t{head} * a.head_dim;
    for (int64_t token = 0; token < a.tokens; ++token, from += 3 * width)
        for (int32_t d = 0; d < a.head_dim; ++d) keys[d * pitch + token] = from[d];
    for (int32_t d = 0; d < a.head_dim; ++d)
        for (int64_t token = a.tokens; token < pitch; ++token) keys[d * pitch + token] = 0.0f;
}

// C (ROWS, VECTORS registers) = A (ROWS, depth) B (depth, VECTORS registers), from strided rows.
template <int ROWS, int VECTORS>
void product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
             float* c, int64_t c_stride) {
    Vector sum[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Vector right[VECTORS];
        LPVIT_UNROLL
        for (int v = 0; v < VECTORS; ++v) right[v] = load(b + k * b_stride + v * LPVIT_LANES);
        LPVIT_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            const float left = a[i * a_stride + k];
            LPVIT_UNROLL
            for (int v = 0; v < VECTORS; ++v) sum[i][v] += left * right[v];
        }
    }
    LPVIT_UNROLL
    for (int i = 0; i < ROWS; ++i)
        LPVIT_UNROLL
        for (int v = 0; v < VECTORS; ++v) store(c + i * c_stride + v * LPVIT_LANES, sum[i][v]);
}

// The same over `vectors` registers, the widest tiles first.
template <int ROWS>
void wide_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                  float* c, int64_t c_stride, int64_t vectors) {
    int64_t v = 0;
#if LPVIT_WIDEST == 4
    for (; v + 4 <= vectors; v += 4)
        product<ROWS, 4>(a, a_stride, b + v * LPVIT_LANES, b_stride, depth, c + v * LPVIT_LANES,
                         c_stride);
#endif
    for (; v + 2 <= vectors; v += 2)
        product<ROWS, 2>(a, a_stride, b + v * LPVIT_LANES, b_stride, depth, c + v * LPVIT_LANES,
                         c_stride);
    if (v < vectors)
        product<ROWS, 1>(a, a_stride, b + v * LPVIT_LANES, b_stride, depth, c + v * LPVIT_LANES,
                         c_stride);
}

template <int ROWS>
void query_tile(const Attention& a, int32_t head, int64_t first, const float* keys, float* scores) {
    const int64_t width = int64_t{a.heads} * a.head_dim, pitch = padded(a.tokens);
    const float* of_head = a.qkv + int64_t{head} * a.head_dim;
    wide_product<ROWS>(of_head + first * 3 * width, 3 * width, keys, pitch, a.head_dim, scores,
                       pitch, pitch / LPVIT_LANES);
    for (int i = 0; i < ROWS; ++i) softmax(scores + i * pitch, a.tokens, a.scale);
    wide_product<ROWS>(scores, pitch, of_head + 2 * width, 3 * width, a.tokens,
                       a.out + first * width + int64_t{head} * a.head_dim, width,
                       a.head_dim / LPVIT_LANES);
}

std::size_t scratch_floats(int64_t tokens, int32_t head_dim) {
    return std::size_t(padded(tokens)) * (head_dim + kRows);
}

void run(const Attention& a, int32_t head, int64_t first, int64_t last, float* scratch) {
    float* const keys = scratch;
    float* const scores = scratch + a.head_dim * padded(a.tokens);
    transpose_keys(a, head, keys);
    for (; first + kRows <= last; first += kRows) query_tile<kRows>(a, head, first, keys, scores);
    for (; first < last; ++first) query_tile<1>(a, head, first, keys, scores);
}

}  // namespace

extern const AttentionKernel LPVIT_SYMBOL(LPVIT_ISA);
const AttentionKernel LPVIT_SYMBOL(LPVIT_ISA) = {LPVIT_LANES, scratch_floats, run};

}  // namespace lpvit
