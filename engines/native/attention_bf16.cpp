// softmax(scale * Q K^T) V of one head as in attention_tile.cpp, with both products in bfloat16 on
// AVX512_BF16: numbers are rounded to bfloat16, products added up in float32, and the softmax between
// them is float32. One instruction takes two dimensions of a key, or two tokens of a value.
#include <immintrin.h>

#include "attention.h"
#include "softmax.h"

// Accumulators live in registers only if every loop over them is unrolled.
#define LPVIT_UNROLL _Pragma("GCC unroll 16")

namespace lpvit {
namespace {

constexpr int kLanes = 16;
constexpr int kRows = 6;  // queries of a tile: rows * 4 accumulators fill the registers

// 16 numbers as bfloat16, each in the low half of a lane.
inline __m512i narrow(const float* from) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)));
}

// Keys, transposed: (head_dim / 2, padded tokens) words of two dimensions.
void pack_keys(const Attention& a, int32_t head, uint32_t* keys) {
    const int64_t width = int64_t{a.heads} * a.head_dim, pitch = padded(a.tokens);
    const float* from = a.qkv + width + int64_t{head} * a.head_dim;
    for (int64_t token = 0; token < pitch; ++token, from += 3 * width)
        for (int32_t d = 0; d < a.head_dim; d += kLanes) {
            uint32_t words[kLanes / 2] = {};
            if (token < a.tokens)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(words),
                                    (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + d)));
            for (int i = 0; i < kLanes / 2; ++i) keys[(d / 2 + i) * pitch + token] = words[i];
        }
}

// Values: (padded tokens / 2, head_dim) words of two tokens.
void pack_values(const Attention& a, int32_t head, uint32_t* values) {
    const int64_t width = int64_t{a.heads} * a.head_dim, pitch = padded(a.tokens);
    const float* from = a.qkv + 2 * width + int64_t{head} * a.head_dim;
    for (int64_t token = 0; token < pitch; token += 2, from += 6 * width)
        for (int32_t d = 0; d < a.head_dim; d += kLanes, values += kLanes) {
            const __m512i zero = _mm512_setzero_si512();
            const __m512i even = token < a.tokens ? narrow(from + d) : zero;
            const __m512i odd = token + 1 < a.tokens ? narrow(from + 3 * width + d) : zero;
            _mm512_storeu_si512(values, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
}

// A row of numbers as words of two neighbours.
inline void pack_row(const float* from, int64_t count, uint32_t* words) {
    for (int64_t k = 0; k < count; k += kLanes)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + k / 2),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + k)));
}

// C (ROWS, VECTORS registers) = A (ROWS, depth words) B (depth words, VECTORS registers).
template <int ROWS, int VECTORS>
void product(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t depth,
             float* c, int64_t c_stride) {
    __m512 sum[ROWS][VECTORS];
    LPVIT_UNROLL
    for (int i = 0; i < ROWS; ++i)
        LPVIT_UNROLL
        for (int v = 0; v < VECTORS; ++v) sum[i][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; ++k) {
        __m512i right[VECTORS];
        LPVIT_UNROLL
        for (int v = 0; v < VECTORS; ++v) right[v] = _mm512_loadu_si512(b + k * b_stride + v * kLanes);
        LPVIT_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            const __m512i left = _mm512_set1_epi32(static_cast<int>(a[i * a_stride + k]));
            LPVIT_UNROLL
            for (int v = 0; v < VECTORS; ++v)
                sum[i][v] = _mm512_dpbf16_ps(sum[i][v], (__m512bh)left, (__m512bh)right[v]);
        }
    }
    LPVIT_UNROLL
    for (int i = 0; i < ROWS; ++i)
        LPVIT_UNROLL
        for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(c + i * c_stride + v * kLanes, sum[i][v]);
}

// The same over `vectors` registers, the widest tiles first.
template <int ROWS>
void wide_product(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride,
                  int64_t depth, float* c, int64_t c_stride, int64_t vectors) {
    int64_t v = 0;
    for (; v + 4 <= vectors; v += 4)
        product<ROWS, 4>(a, a_stride, b + v * kLanes, b_stride, depth, c + v * kLanes, c_stride);
    for (; v + 2 <= vectors; v += 2)
        product<ROWS, 2>(a, a_stride, b + v * kLanes, b_stride, depth, c + v * kLanes, c_stride);
    if (v < vectors)
        product<ROWS, 1>(a, a_stride, b + v * kLanes, b_stride, depth, c + v * kLanes, c_stride);
}

// What one task works in.
struct Scratch {
    uint32_t* keys;
    uint32_t* values;
    float* scores;
    uint32_t* words;  // of the tile's queries, then of its softmax
};

template <int ROWS>
void query_tile(const Attention& a, int32_t head, int64_t first, const Scratch& at) {
    const int64_t width = int64_t{a.heads} * a.head_dim, pitch = padded(a.tokens);
    const float* const queries = a.qkv + first * 3 * width + int64_t{head} * a.head_dim;
    const int64_t half = pitch / 2, dims = a.head_dim / 2;
    for (int i = 0; i < ROWS; ++i)
        pack_row(queries + i * 3 * width, a.head_dim, at.words + i * dims);
    wide_product<ROWS>(at.words, dims, at.keys, pitch, dims, at.scores, pitch, pitch / kLanes);
    for (int i = 0; i < ROWS; ++i) {
        float* const row = at.scores + i * pitch;
        softmax(row, a.tokens, a.scale);
        for (int64_t k = a.tokens; k < pitch; ++k) row[k] = 0;
        pack_row(row, pitch, at.words + i * half);
    }
    wide_product<ROWS>(at.words, half, at.values, a.head_dim, (a.tokens + 1) / 2,
                       a.out + first * width + int64_t{head} * a.head_dim, width,
                       a.head_dim / kLanes);
}

inline int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

std::size_t scratch_floats(int64_t tokens, int32_t head_dim) {
    const int64_t pitch = padded(tokens);
    return std::size_t(pitch * head_dim + kRows * pitch + kRows * larger_of(pitch, head_dim) / 2);
}

void run(const Attention& a, int32_t head, int64_t first, int64_t last, float* scratch) {
    const int64_t pitch = padded(a.tokens), packed = pitch * a.head_dim / 2;
    auto* const words = reinterpret_cast<uint32_t*>(scratch);
    const Scratch at = {words, words + packed, scratch + 2 * packed,
                        words + 2 * packed + kRows * pitch};
    pack_keys(a, head, at.keys);
    pack_values(a, head, at.values);
    for (; first + kRows <= last; first += kRows) query_tile<kRows>(a, head, first, at);
    for (; first < last; ++first) query_tile<1>(a, head, first, at);
}

}  // namespace

extern const AttentionKernel avx512_bf16_attention;
const AttentionKernel avx512_bf16_attention = {kLanes, scratch_floats, run};

}  // namespace lpvit
