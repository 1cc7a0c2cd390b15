// X in int8: quantised token by token, laid out so that the stored columns of a block row can be gathered
// fast. Included by kernel_int8.cpp, which is compiled with flags of its own: everything is in an
// anonymous namespace, so that the linker never shares a copy between instruction sets.
#pragma once

#include "kernel.h"
#include "min_max.h"

// Accumulators live in registers only if every loop over them is unrolled.
#define LPVIT_UNROLL _Pragma("GCC unroll 16")
#if defined(__clang__)
#define LPVIT_SHUFFLE(a, b, type, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LPVIT_SHUFFLE(a, b, type, ...) __builtin_shuffle(a, b, type{__VA_ARGS__})
#endif

namespace lpvit {
namespace {

typedef float Vector __attribute__((vector_size(4 * LPVIT_LANES)));
typedef float Loose __attribute__((vector_size(4 * LPVIT_LANES), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(4 * LPVIT_LANES)));
typedef uint32_t Word __attribute__((vector_size(4 * LPVIT_LANES)));

constexpr int kStep = 4;        // features in a word
constexpr int kSlots = 16;      // bytes of a feature in the copy: 12 tokens and four unused
constexpr float kLevels = 255;  // of a token's numbers, above its smallest
// Below this distance between a token's largest and smallest number it counts as zero.
constexpr float kSmallest = 1e-30f;

// How the 12 tokens of a chunk lie in the copy of X: kSlots bytes for each feature, then these.
struct Scales {
    float scale[kChunk];
    int32_t zero[kChunk];
    char padding[32];
};

// Features in the copy: at least one more than X has, so that something is there to pad with.
inline int64_t padded(int64_t features) { return (features / LPVIT_LANES + 1) * LPVIT_LANES; }

inline std::size_t chunk_bytes(int64_t features) {
    const std::size_t bytes = padded(features) * kSlots + sizeof(Scales);
    return (bytes + 63) / 64 * 64;
}

inline Scales* scales_of(void* chunk, int64_t features) {
    return reinterpret_cast<Scales*>(static_cast<char*>(chunk) + padded(features) * kSlots);
}

inline void* chunk_of(const Operands& at, int64_t token, int64_t features) {
    return static_cast<char*>(at.prepared) + token / kChunk * chunk_bytes(features);
}

std::size_t prepared_bytes(int64_t tokens, int64_t features) {
    return std::size_t((tokens + kChunk - 1) / kChunk) * chunk_bytes(features);
}

std::size_t scratch_bytes(int64_t steps) {
    return std::size_t(steps * kChunk + kSlots) * sizeof(uint32_t);
}

// The numbers of one token from `feature` on; what does not exist is zero.
inline Vector features_of(const float* x, int64_t feature, int64_t features) {
    if (feature + LPVIT_LANES <= features) return *reinterpret_cast<const Loose*>(x + feature);
    Vector some = {};
    for (int i = 0; i < LPVIT_LANES; ++i)
        if (feature + i < features) some[i] = x[feature + i];
    return some;
}

// The scale and zero point that map what is between a token's smallest and largest number, and
// zero, to 0 to 255. Anything infinite or not a number makes the scale, and every answer, NaN.
void measure(const float* x, int64_t features, float& scale, int32_t& zero) {
    constexpr int chains = 2;  // so that one need not wait for the other
    Vector low[chains] = {}, high[chains] = {}, poison[chains] = {};
    for (int64_t f = 0; f < features; f += chains * LPVIT_LANES)
        LPVIT_UNROLL
        for (int i = 0; i < chains; ++i) {
            const Vector values = features_of(x, f + i * LPVIT_LANES, features);
            low[i] = smaller(values, low[i]);
            high[i] = larger(values, high[i]);
            poison[i] += values * 0.0f;
        }
    low[0] = smaller(low[0], low[1]);
    high[0] = larger(high[0], high[1]);
    poison[0] += poison[1];
    float least = 0, most = 0, poisoned = 0;
    for (int i = 0; i < LPVIT_LANES; ++i) {
        least = low[0][i] < least ? low[0][i] : least;
        most = high[0][i] > most ? high[0][i] : most;
        poisoned += poison[0][i];
    }
    const float range = most - least;
    poisoned += range * 0.0f;
    const bool is_usable = poisoned == 0.0f && range > kSmallest;
    scale = is_usable ? range / kLevels : poisoned;
    zero = is_usable ? static_cast<int32_t>(-least * (kLevels / range) + 0.5f) : 0;
}

// Four words side by side, of which a feature has three; the fourth is zero.
typedef uint32_t Quad __attribute__((vector_size(16), may_alias));
typedef uint64_t Halves __attribute__((vector_size(16), may_alias));

// Writes four features from `first` on, whose words lie in a row each, word by word for each feature.
inline void store_transposed(const uint32_t (&words)[kChunk / kStep][LPVIT_LANES], int first,
                             uint32_t* to) {
    const Quad a = *reinterpret_cast<const Quad*>(words[0] + first);
    const Quad b = *reinterpret_cast<const Quad*>(words[1] + first);
    const Quad c = *reinterpret_cast<const Quad*>(words[2] + first);
    const Quad none = {};
    const Halves ab = (Halves)LPVIT_SHUFFLE(a, b, Quad, 0, 4, 1, 5);
    const Halves ab_rest = (Halves)LPVIT_SHUFFLE(a, b, Quad, 2, 6, 3, 7);
    const Halves cd = (Halves)LPVIT_SHUFFLE(c, none, Quad, 0, 4, 1, 5);
    const Halves cd_rest = (Halves)LPVIT_SHUFFLE(c, none, Quad, 2, 6, 3, 7);
    Halves* const features = reinterpret_cast<Halves*>(to);
    features[0] = LPVIT_SHUFFLE(ab, cd, Halves, 0, 2);
    features[1] = LPVIT_SHUFFLE(ab, cd, Halves, 1, 3);
    features[2] = LPVIT_SHUFFLE(ab_rest, cd_rest, Halves, 0, 2);
    features[3] = LPVIT_SHUFFLE(ab_rest, cd_rest, Halves, 1, 3);
}

// Quantises one chunk: for each feature the bytes of its 12 tokens, side by side. With OFFSET 128 the
// bytes are signed, q - 128, and so are the zero points.
template <int32_t OFFSET>
void prepare_chunk(const Operands& at, int64_t tokens, int64_t features, int64_t first) {
    auto* to = static_cast<uint32_t*>(chunk_of(at, first, features));
    Scales& scales = *scales_of(to, features);
    const float* rows[kChunk];
    float inverse[kChunk], shift[kChunk];
    for (int i = 0; i < kChunk; ++i) {
        const bool exists = first + i < tokens;
        rows[i] = static_cast<const float*>(at.x) + (exists ? first + i : first) * at.x_stride;
        scales.scale[i] = 0;
        scales.zero[i] = 0;
        if (exists) measure(rows[i], features, scales.scale[i], scales.zero[i]);
        inverse[i] = scales.scale[i] > 0 ? 1.0f / scales.scale[i] : 0.0f;
        shift[i] = static_cast<float>(scales.zero[i]) + 0.5f;
        scales.zero[i] -= OFFSET;
    }
    const Vector none = {};
    const Word offset = Word{} + (OFFSET ? 0x80808080u : 0u);
    for (int64_t f = 0; f < padded(features); f += LPVIT_LANES, to += LPVIT_LANES * kSlots / 4) {
        alignas(4 * LPVIT_LANES) uint32_t words[kChunk / kStep][LPVIT_LANES];
        for (int word = 0; word < kChunk / kStep; ++word) {
            Word packed = {};
            LPVIT_UNROLL
            for (int i = 0; i < kStep; ++i) {
                const int row = word * kStep + i;
                const Vector values = features_of(rows[row], f, features);
                const Vector q = larger(values * inverse[row] + shift[row], none);
                packed |= (Word)__builtin_convertvector(smaller(q, none + kLevels), Int) << (8 * i);
            }
            *reinterpret_cast<Word*>(words[word]) = packed ^ offset;
        }
        for (int i = 0; i < LPVIT_LANES; i += 4) store_transposed(words, i, to + i * kSlots / 4);
    }
}

template <int32_t OFFSET>
void prepare(const Operands& at, int64_t tokens, int64_t features, int64_t first, int64_t last) {
    for (int64_t token = first; token < last; token += kChunk)
        prepare_chunk<OFFSET>(at, tokens, features, token);
}

// The panel of 12 tokens: for each step, 12 words of four features.
void gather(const void* chunk, const int32_t* columns, int64_t steps, uint32_t* panel) {
    typedef uint8_t Bytes __attribute__((vector_size(16), may_alias));
    typedef uint16_t Pairs __attribute__((vector_size(16), may_alias));
    typedef uint32_t Words __attribute__((vector_size(16), aligned(4), may_alias));
    const Bytes* const x = static_cast<const Bytes*>(chunk);
    for (int64_t step = 0; step < steps; ++step, columns += kStep, panel += kChunk) {
        const Bytes a = x[columns[0]], b = x[columns[1]], c = x[columns[2]], d = x[columns[3]];
        const Pairs ab = (Pairs)LPVIT_SHUFFLE(a, b, Bytes, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21,
                                              6, 22, 7, 23);
        const Pairs cd = (Pairs)LPVIT_SHUFFLE(c, d, Bytes, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21,
                                              6, 22, 7, 23);
        const Pairs ab_rest = (Pairs)LPVIT_SHUFFLE(a, b, Bytes, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28,
                                                   13, 29, 14, 30, 15, 31);
        const Pairs cd_rest = (Pairs)LPVIT_SHUFFLE(c, d, Bytes, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28,
                                                   13, 29, 14, 30, 15, 31);
        Words* const to = reinterpret_cast<Words*>(panel);
        to[0] = (Words)LPVIT_SHUFFLE(ab, cd, Pairs, 0, 8, 1, 9, 2, 10, 3, 11);
        to[1] = (Words)LPVIT_SHUFFLE(ab, cd, Pairs, 4, 12, 5, 13, 6, 14, 7, 15);
        to[2] = (Words)LPVIT_SHUFFLE(ab_rest, cd_rest, Pairs, 0, 8, 1, 9, 2, 10, 3, 11);
    }
}

}  // namespace
}  // namespace lpvit
