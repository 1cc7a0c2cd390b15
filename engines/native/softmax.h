// Softmax over rows of scores, for kernels that are compiled with flags of their own: inside an anonymous
// namespace, so that the linker never shares a copy between them. LPVIT_LANES is theirs.
#pragma once

#include <cstdint>

#include "min_max.h"

namespace lpvit {
namespace {

typedef float Vector __attribute__((vector_size(4 * LPVIT_LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LPVIT_LANES)));
typedef float Loose __attribute__((vector_size(4 * LPVIT_LANES), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Loose*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Loose*>(to) = value; }

// Keys are padded to whole registers: the padding's scores are computed and then thrown away.
inline int64_t padded(int64_t tokens) {
    return (tokens + LPVIT_LANES - 1) / LPVIT_LANES * LPVIT_LANES;
}

// exp(x) for x <= 0, within 2 units in the last place: x = n ln 2 + r, |r| <= ln 2 / 2, ln 2 in two
// parts so that r is exact; exp(r) by its Taylor polynomial of degree 7, whose rest is below 6e-9.
// Below -87 the answer is exp(-87) = 1.6e-38, nothing beside the row's largest, which is 1. NaN stays
// NaN: the order of larger()'s arguments decides which of the two comes out, and `whole` is free of
// it only because a NaN has no integer.
inline Vector exp_negative(Vector x) {
    constexpr float p[] = {1.0f,         1.0f,         0.5f,          1.0f / 6.0f,
                           1.0f / 24.0f, 1.0f / 120.0f, 1.0f / 720.0f, 1.0f / 5040.0f};
    constexpr float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const Vector zero = {};
    const Vector whole = larger(x, zero - 87.0f);
    x = larger(zero - 87.0f, x);
    const Vector n = (whole * 1.44269504088896341f + shift) - shift;
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector y = zero + p[7];
    for (int i = 6; i >= 0; --i) y = y * r + p[i];
    const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    return y * reinterpret_cast<Vector>(power);
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

}  // namespace
}  // namespace lpvit
