// softmax(scale * Q K^T) V of one head, over the compiler's vector extensions and compiled once per
// instruction set like kernel.cpp, with the same three macros. The whole of one query tile's scores
// stays in the first-level cache between the two products, so they never go to memory.
#include "attention.h"

#define LPVIT_JOIN(a, b) a##b
#define LPVIT_SYMBOL(isa) LPVIT_JOIN(isa, _attention)
// Accumulators live in registers only if every loop over them is unrolled.
#define LPVIT_UNROLL _Pragma("GCC unroll 16")

namespace lpvit {
namespace {

typedef float Vector __attribute__((vector_size(4 * LPVIT_LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LPVIT_LANES)));
typedef float Loose __attribute__((vector_size(4 * LPVIT_LANES), aligned(4), may_alias));

constexpr int kRows = 6;  // queries of a tile: rows * widest accumulators fill the registers

inline Vector load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Loose*>(to) = value; }
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// Keys are padded to whole registers: the padding's scores are computed and then thrown away.
inline int64_t padded(int64_t tokens) {
    return (tokens + LPVIT_LANES - 1) / LPVIT_LANES * LPVIT_LANES;
}

// exp(x) for x <= 0, within 2 units in the last place: x = n ln 2 + r, |r| <= ln 2 / 2, ln 2 in two
// parts so that r is exact; exp(r) by its Taylor polynomial of degree 7, whose rest is below 6e-9.
// Below -87 the answer is exp(-87) = 1.6e-38, nothing beside the row's largest, which is 1.
inline Vector exp_negative(Vector x) {
    constexpr float p[] = {1.0f,         1.0f,         0.5f,          1.0f / 6.0f,
                           1.0f / 24.0f, 1.0f / 120.0f, 1.0f / 720.0f, 1.0f / 5040.0f};
    constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const Vector zero = {};
    x = larger(x, zero - 87.0f);
    const Vector n = (x * 1.44269504088896341f + shift) - shift;
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector y = zero + p[7];
    for (int i = 6; i >= 0; --i) y = y * r + p[i];
    const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    return y * reinterpret_cast<Vector>(power);
}

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

// Turns a row of raw scores into weights that add up to one, in place.
void softmax(float* row, int64_t tokens, float scale) {
    const int64_t whole = tokens / LPVIT_LANES * LPVIT_LANES;
    const Vector zero = {};
    Vector most = zero + row[0];
    for (int64_t k = 0; k < whole; k += LPVIT_LANES) most = larger(most, load(row + k));
    float top = row[0];
    for (int lane = 0; lane < LPVIT_LANES; ++lane) top = most[lane] > top ? most[lane] : top;
    for (int64_t k = whole; k < tokens; ++k) top = row[k] > top ? row[k] : top;
    const int64_t pitch = padded(tokens);
    for (int64_t k = tokens; k < pitch; ++k) row[k] = top;
    Vector sums = {};
    for (int64_t k = 0; k < pitch; k += LPVIT_LANES) {
        const Vector e = exp_negative((load(row + k) - top) * scale);
        store(row + k, e);
        sums += e;
    }
    float sum = float(tokens - pitch);  // the padding counted 1 each
    for (int lane = 0; lane < LPVIT_LANES; ++lane) sum += sums[lane];
    const float inverse = 1.0f / sum;
    for (int64_t k = 0; k < pitch; k += LPVIT_LANES) store(row + k, load(row + k) * inverse);
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
