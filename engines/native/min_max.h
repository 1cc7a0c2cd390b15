// The smaller and the larger of two registers of floats, lane by lane; b where either is not a number.
// One instruction each, where GCC makes a comparison and a choice. For kernels that are compiled with
// flags of their own: inside an anonymous namespace, so that the linker never shares a copy.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace lpvit {
namespace {

template <class Vector>
inline Vector smaller(Vector a, Vector b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Vector) == 64) return (Vector)_mm512_min_ps((__m512)a, (__m512)b);
#endif
#if defined(__AVX__)
    if constexpr (sizeof(Vector) == 32) return (Vector)_mm256_min_ps((__m256)a, (__m256)b);
#endif
#if defined(__SSE2__)
    if constexpr (sizeof(Vector) == 16) return (Vector)_mm_min_ps((__m128)a, (__m128)b);
#endif
    return a < b ? a : b;
}

template <class Vector>
inline Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Vector) == 64) return (Vector)_mm512_max_ps((__m512)a, (__m512)b);
#endif
#if defined(__AVX__)
    if constexpr (sizeof(Vector) == 32) return (Vector)_mm256_max_ps((__m256)a, (__m256)b);
#endif
#if defined(__SSE2__)
    if constexpr (sizeof(Vector) == 16) return (Vector)_mm_max_ps((__m128)a, (__m128)b);
#endif
    return a > b ? a : b;
}

}  // namespace
}  // namespace lpvit
