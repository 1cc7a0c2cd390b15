// The block-sparse tile in bfloat16 on AVX512_BF16: one instruction multiplies two input features of
// 16 outputs and adds them in float32.
//
// Its two features need not be neighbours: any two stored columns of a block row form a step, and
// their weights lie in pairs. What X has in these columns is gathered into a panel before, once for
// each 6 tokens of a block row, from a copy of X that holds the 6 tokens of a feature side by side.
// So a block of one column costs what a wide one does.
#include <immintrin.h>

#include "gelu.h"
#include "kernel.h"

// Accumulators live in registers only if every loop over them is unrolled.
#define LPVIT_UNROLL _Pragma("GCC unroll 16")

namespace lpvit {
namespace {

typedef float Vector __attribute__((vector_size(64)));

constexpr int kLanes = 16;
constexpr int kWidest = 4;
constexpr int kRows = 6;   // tokens of a tile: kRows * kWidest accumulators fill the registers
constexpr int kSlots = 8;  // tokens of a feature in the copy of X, two of them unused
constexpr int kStep = 2;
constexpr int kLineFloats = 16;
constexpr int kPrefetchFloats = 1024;  // as in kernel.cpp

// Features in the copy of X: at least one more than X has, so that there are zeros to pad with.
inline int64_t padded(int64_t features) { return (features / kLanes + 1) * kLanes; }

std::size_t prepared_bytes(int64_t tokens, int64_t features) {
    return std::size_t((tokens + kRows - 1) / kRows * padded(features)) * kSlots * sizeof(uint16_t);
}

std::size_t scratch_bytes(int64_t steps) {
    return std::size_t(steps * kRows + kSlots) * sizeof(uint32_t);
}

// 16 features of one token, rounded to the nearest bfloat16, each in the low half of a lane.
inline __m512i features_of(const Operands& at, int64_t token, int64_t feature, __mmask16 exist) {
    const std::size_t from = token * at.x_stride + feature;
    if (at.element == kBfloat16)
        return _mm512_cvtepu16_epi32(
            _mm256_maskz_loadu_epi16(exist, static_cast<const uint16_t*>(at.x) + from));
    const __m512 row = _mm512_maskz_loadu_ps(exist, static_cast<const float*>(at.x) + from);
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(row));
}

// Writes 16 features of 6 tokens, whose lanes hold (tokens 0 and 1), (2 and 3), (4 and 5): token by
// token for each feature.
inline void store_transposed(const __m512i (&pairs)[3], uint16_t* to) {
    const __m512i zero = _mm512_setzero_si512();
    const __m512i low = _mm512_unpacklo_epi32(pairs[0], pairs[1]);
    const __m512i high = _mm512_unpackhi_epi32(pairs[0], pairs[1]);
    const __m512i low_rest = _mm512_unpacklo_epi32(pairs[2], zero);
    const __m512i high_rest = _mm512_unpackhi_epi32(pairs[2], zero);
    // Of every four features one, in each quarter of a register.
    const __m512i f0 = _mm512_unpacklo_epi64(low, low_rest);
    const __m512i f1 = _mm512_unpackhi_epi64(low, low_rest);
    const __m512i f2 = _mm512_unpacklo_epi64(high, high_rest);
    const __m512i f3 = _mm512_unpackhi_epi64(high, high_rest);
    const __m512i a = _mm512_shuffle_i32x4(f0, f1, 0x44), b = _mm512_shuffle_i32x4(f2, f3, 0x44);
    const __m512i c = _mm512_shuffle_i32x4(f0, f1, 0xee), d = _mm512_shuffle_i32x4(f2, f3, 0xee);
    _mm512_storeu_si512(to, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_storeu_si512(to + 4 * kSlots, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_storeu_si512(to + 8 * kSlots, _mm512_shuffle_i32x4(c, d, 0x88));
    _mm512_storeu_si512(to + 12 * kSlots, _mm512_shuffle_i32x4(c, d, 0xdd));
}

void prepare(const Operands& at, int64_t tokens, int64_t features, int64_t first, int64_t last) {
    for (int64_t token = first; token < last; token += kRows) {
        uint16_t* to = static_cast<uint16_t*>(at.prepared) + token / kRows * padded(features) * kSlots;
        for (int64_t f = 0; f < padded(features); f += kLanes, to += kLanes * kSlots) {
            const int64_t left = features - f;
            const auto exist = static_cast<__mmask16>(left >= kLanes ? 0xffff : (1 << left) - 1);
            __m512i pairs[kRows / 2] = {};
            for (int row = 0; row < kRows && token + row < tokens; ++row) {
                const __m512i values = features_of(at, token + row, f, exist);
                pairs[row / 2] = _mm512_or_si512(
                    pairs[row / 2], row % 2 ? _mm512_slli_epi32(values, 16) : values);
            }
            store_transposed(pairs, to);
        }
    }
}

// The panel of 6 tokens: for each step, 6 words of two features.
void gather(const uint16_t* tile, const int32_t* columns, int64_t steps, uint32_t* panel) {
    const __m256i interleaved = _mm256_setr_epi16(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    for (int64_t step = 0; step < steps; ++step, columns += kStep, panel += kRows) {
        const auto* even = reinterpret_cast<const __m128i*>(tile + int64_t{columns[0]} * kSlots);
        const auto* odd = reinterpret_cast<const __m128i*>(tile + int64_t{columns[1]} * kSlots);
        // Eight words, of which the next step overwrites the last two.
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(panel),
                            _mm256_permutex2var_epi16(_mm256_castsi128_si256(_mm_load_si128(even)),
                                                      interleaved,
                                                      _mm256_castsi128_si256(_mm_load_si128(odd))));
    }
}

// One register of a tile's answer, of which `outputs` exist.
inline void store(const Operands& at, int64_t token, int64_t output, __m512 value, int outputs) {
    const auto exist = static_cast<__mmask16>(outputs >= kLanes ? 0xffff : (1 << outputs) - 1);
    const std::size_t to = token * at.y_stride + output;
    if (at.element == kBfloat16)
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(at.y) + to, exist,
                                 (__m256i)_mm512_cvtneps_pbh(value));
    else
        _mm512_mask_storeu_ps(static_cast<float*>(at.y) + to, exist, value);
}

// One tile: 6 tokens by VECTORS registers of outputs stay in registers for the whole sum. Of the
// tokens `rows` exist.
template <int VECTORS>
void tile(const Strip& strip, const uint32_t* panel, const Operands& at, int64_t token, int rows,
          Activation activation) {
    const float* w = strip.weights;
    __m512 sum[kRows][VECTORS];
    LPVIT_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        const __m512 bias = _mm512_loadu_ps(strip.bias + v * kLanes);
        LPVIT_UNROLL
        for (int i = 0; i < kRows; ++i) sum[i][v] = bias;
    }
    for (int32_t step = 0; step < strip.blocks; ++step, w += VECTORS * kLanes, panel += kRows) {
        for (int line = 0; line < VECTORS * kLanes; line += kLineFloats)
            __builtin_prefetch(w + kPrefetchFloats + line, 0, 2);
        __m512i weights[VECTORS];
        LPVIT_UNROLL
        for (int v = 0; v < VECTORS; ++v) weights[v] = _mm512_loadu_si512(w + v * kLanes);
        LPVIT_UNROLL
        for (int i = 0; i < kRows; ++i) {
            const __m512i pair = _mm512_set1_epi32(static_cast<int>(panel[i]));
            LPVIT_UNROLL
            for (int v = 0; v < VECTORS; ++v)
                sum[i][v] = _mm512_dpbf16_ps(sum[i][v], (__m512bh)weights[v], (__m512bh)pair);
        }
    }
    __m512 answer[kRows][VECTORS];  // in the first-level cache: a loop here keeps the tile small
    LPVIT_UNROLL
    for (int i = 0; i < kRows; ++i)
        LPVIT_UNROLL
        for (int v = 0; v < VECTORS; ++v) answer[i][v] = sum[i][v];
    for (int i = 0; i < rows; ++i)
        for (int v = 0; v < VECTORS; ++v) {
            const __m512 value = activation == kGelu ? (__m512)gelu((Vector)answer[i][v]) : answer[i][v];
            store(at, token + i, strip.first_output + v * kLanes, value, strip.outputs - v * kLanes);
        }
}

void run(const Strip* strips, int32_t count, const Operands& at, int64_t first, int64_t last,
         int32_t features, Activation activation) {
    auto* const panel = static_cast<uint32_t*>(at.scratch);
    for (int64_t token = first; token < last; token += kRows) {
        const int rows = static_cast<int>(last - token < kRows ? last - token : kRows);
        const uint16_t* of_tile = static_cast<const uint16_t*>(at.prepared) +
                                  token / kRows * padded(features) * kSlots;
        gather(of_tile, strips->columns, strips->blocks, panel);
        for (const Strip* strip = strips; strip != strips + count; ++strip) {
            if (strip->vectors == 1)
                tile<1>(*strip, panel, at, token, rows, activation);
            else if (strip->vectors == 2)
                tile<2>(*strip, panel, at, token, rows, activation);
            else
                tile<4>(*strip, panel, at, token, rows, activation);
        }
    }
}

int64_t fma_loop(int64_t rounds) {
    constexpr int chains = 12;  // enough to hide the latency of one multiply-add
    __m512 sum[chains];
    LPVIT_UNROLL
    for (int i = 0; i < chains; ++i) sum[i] = _mm512_set1_ps(float(i));
    const __m512i half = _mm512_set1_epi16(0x3f00);
    for (int64_t round = 0; round < rounds; ++round) {
        LPVIT_UNROLL
        for (int i = 0; i < chains; ++i)
            sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)half, (__m512bh)half);
        asm volatile("" ::: "memory");  // so that the rounds are not folded into one
    }
    LPVIT_UNROLL
    for (int i = 1; i < chains; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
    volatile float keep = _mm512_cvtss_f32(sum[0]);
    (void)keep;
    return rounds * chains * kLanes * kStep * 2;
}

const Preparation preparation = {prepared_bytes, scratch_bytes, prepare};

}  // namespace

extern const Kernel avx512_bf16_kernel;
const Kernel avx512_bf16_kernel = {
    "avx512_bf16", kLanes, kWidest, kStep, run, fma_loop, &preparation, 0};

}  // namespace lpvit
