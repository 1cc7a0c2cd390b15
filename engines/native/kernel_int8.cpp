// The block-sparse tile in int8, compiled once per instruction set like kernel.cpp, with one macro more:
//   LPVIT_INT8    name of this kernel, as in avx512_vnni
//
// Weights are signed, with one scale for each output; X is unsigned, with a scale and a zero point of
// its own for each token (int8_tokens.h): x = scale * (q - zero). So sum(x w) = scale * (sum(q w) -
// zero * sum(w)), and the bracket is an exact integer, which starts at its second term.
//
// One instruction takes four input features of one output. They need not be neighbours: as in
// kernel_bf16.cpp, any four stored columns of a block row form a step.
#include "gelu.h"
#include "int8_tokens.h"
#include "kernel.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define LPVIT_JOIN(a, b) a##b
#define LPVIT_SYMBOL(name) LPVIT_JOIN(name, _kernel)
#define LPVIT_TEXT(name) #name
#define LPVIT_NAME(name) LPVIT_TEXT(name)

namespace lpvit {
namespace {

typedef int32_t LooseInt __attribute__((vector_size(4 * LPVIT_LANES), aligned(4), may_alias));

constexpr int kLineFloats = 16;
constexpr int kPrefetchFloats = 1024;  // as in kernel.cpp

// sum + the products of four unsigned x and four signed w in each lane, exactly. Where only signed
// bytes can be multiplied, q - 128 stands for q in x and in the zero point.
#if defined(__AVX512VNNI__)
constexpr int32_t kOffset = 0, kWeightLevels = 127;
inline Int multiply_add(Int sum, Int x, Int w) {
    return (Int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
}
#elif defined(__AVX2__)
// Two products are added in 16 bits, which saturates above 32767; 2 * 255 * 63 stays below.
constexpr int32_t kOffset = 0, kWeightLevels = 63;
inline Int multiply_add(Int sum, Int x, Int w) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)x, (__m256i)w);
    return sum + (Int)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int32_t kOffset = 128, kWeightLevels = 127;
inline Int multiply_add(Int sum, Int x, Int w) {
    return (Int)vdotq_s32((int32x4_t)sum, (int8x16_t)x, (int8x16_t)w);
}
#elif defined(__ARM_NEON)
// Two products are added in 16 bits: 2 * 128 * 127 is below 32768.
constexpr int32_t kOffset = 128, kWeightLevels = 127;
inline Int multiply_add(Int sum, Int x, Int w) {
    const int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)x), vget_low_s8((int8x16_t)w));
    const int16x8_t high = vmull_high_s8((int8x16_t)x, (int8x16_t)w);
    return (Int)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high));
}
#else
constexpr int32_t kOffset = 0, kWeightLevels = 127;
typedef int16_t Short __attribute__((vector_size(4 * LPVIT_LANES)));
typedef uint16_t UnsignedShort __attribute__((vector_size(4 * LPVIT_LANES)));
inline Int halves(Short products) {
    const Word bits = (Word)products;
    return ((Int)(bits << 16) >> 16) + ((Int)bits >> 16);
}
inline Int multiply_add(Int sum, Int x, Int w) {
    const UnsignedShort xs = (UnsignedShort)x, ws = (UnsignedShort)w;
    const Short even = (Short)(xs & 255) * ((Short)(ws << 8) >> 8);  // 255 * 127 fits 16 bits
    const Short odd = (Short)(xs >> 8) * ((Short)ws >> 8);
    return sum + halves(even) + halves(odd);
}
#endif

// Tile heights that fill the registers: rows * vectors accumulators, the weights, one broadcast.
constexpr int tile_rows(int vectors) { return vectors < LPVIT_WIDEST ? 12 : 6; }

// Answers of one token and register: from exact integers to float32.
template <int VECTORS>
inline void finish(const Strip& strip, const Operands& at, int64_t token, const Int* sums,
                   float scale, Activation activation) {
    constexpr int width = VECTORS * LPVIT_LANES;
    float* const y = static_cast<float*>(at.y) + token * at.y_stride + strip.first_output;
    float padded_outputs[width];
    float* const to = strip.outputs == width ? y : padded_outputs;
    for (int v = 0; v < VECTORS; ++v) {
        const float* const of_lane = strip.bias + v * LPVIT_LANES;
        const Vector bias = *reinterpret_cast<const Loose*>(of_lane);
        const Vector scales = *reinterpret_cast<const Loose*>(of_lane + width);
        const Vector value = __builtin_convertvector(sums[v], Vector) * (scales * scale) + bias;
        *reinterpret_cast<Loose*>(to + v * LPVIT_LANES) = activation == kGelu ? gelu(value) : value;
    }
    if (to != y)
        for (int32_t r = 0; r < strip.outputs; ++r) y[r] = padded_outputs[r];
}

// One tile: ROWS tokens by VECTORS registers of outputs stay in registers for the whole sum. Of the
// tokens `rows` exist; `row` is the first one's place in its chunk.
template <int ROWS, int VECTORS>
void tile(const Strip& strip, const uint32_t* panel, const Scales& scales, int row,
          const Operands& at, int64_t token, int rows, Activation activation) {
    constexpr int width = VECTORS * LPVIT_LANES;
    const float* w = strip.weights;
    Int sum[ROWS][VECTORS];
    LPVIT_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        const Int totals =
            *reinterpret_cast<const LooseInt*>(strip.bias + 2 * width + v * LPVIT_LANES);
        LPVIT_UNROLL
        for (int i = 0; i < ROWS; ++i) sum[i][v] = totals * -scales.zero[row + i];
    }
    panel += row;
    for (int32_t step = 0; step < strip.blocks; ++step, w += width, panel += kChunk) {
        for (int line = 0; line < width; line += kLineFloats)
            __builtin_prefetch(w + kPrefetchFloats + line, 0, 2);
        Int weights[VECTORS];
        LPVIT_UNROLL
        for (int v = 0; v < VECTORS; ++v)
            weights[v] = *reinterpret_cast<const LooseInt*>(w + v * LPVIT_LANES);
        LPVIT_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            const Int x = Int{} + static_cast<int32_t>(panel[i]);
            LPVIT_UNROLL
            for (int v = 0; v < VECTORS; ++v) sum[i][v] = multiply_add(sum[i][v], x, weights[v]);
        }
    }
    Int answer[ROWS][VECTORS];  // in the first-level cache: a loop here keeps the tile small
    LPVIT_UNROLL
    for (int i = 0; i < ROWS; ++i)
        LPVIT_UNROLL
        for (int v = 0; v < VECTORS; ++v) answer[i][v] = sum[i][v];
    for (int i = 0; i < rows; ++i)
        finish<VECTORS>(strip, at, token + i, answer[i], scales.scale[row + i], activation);
}

template <int VECTORS>
void run_tiles(const Strip& strip, const uint32_t* panel, const Scales& scales, const Operands& at,
               int64_t token, int64_t last, Activation activation) {
    constexpr int height = tile_rows(VECTORS);
    for (int row = 0; row < kChunk && token + row < last; row += height) {
        const int64_t left = last - token - row;
        tile<height, VECTORS>(strip, panel, scales, row, at, token + row,
                              static_cast<int>(left < height ? left : height), activation);
    }
}

void run(const Strip* strips, int32_t count, const Operands& at, int64_t first, int64_t last,
         int32_t features, Activation activation) {
    auto* const panel = static_cast<uint32_t*>(at.scratch);
    for (int64_t token = first; token < last; token += kChunk) {
        void* const chunk = chunk_of(at, token, features);
        const Scales& scales = *scales_of(chunk, features);
        gather(chunk, strips->columns, strips->blocks, panel);
        for (const Strip* strip = strips; strip != strips + count; ++strip) {
            if (strip->vectors == 1)
                run_tiles<1>(*strip, panel, scales, at, token, last, activation);
            else if (strip->vectors == 2)
                run_tiles<2>(*strip, panel, scales, at, token, last, activation);
#if LPVIT_WIDEST == 4
            else
                run_tiles<4>(*strip, panel, scales, at, token, last, activation);
#endif
        }
    }
}

int64_t fma_loop(int64_t rounds) {
    constexpr int chains = 12;  // enough to hide the latency of one multiply-add
    Int sum[chains];
    LPVIT_UNROLL
    for (int i = 0; i < chains; ++i) sum[i] = Int{} + i;
    const Int ones = Int{} + 0x01010101;
    for (int64_t round = 0; round < rounds; ++round) {
        // Each chain with a factor of its own: an instruction set of several steps shared one's product.
        LPVIT_UNROLL
        for (int i = 0; i < chains; ++i) sum[i] = multiply_add(sum[i], ones, sum[i]);
        asm volatile("" ::: "memory");  // so that the rounds are not folded into one
    }
    LPVIT_UNROLL
    for (int i = 1; i < chains; ++i) sum[0] += sum[i];
    volatile int32_t keep = sum[0][0];
    (void)keep;
    return rounds * chains * LPVIT_LANES * kStep * 2;
}

const Preparation preparation = {prepared_bytes, scratch_bytes, prepare<kOffset>};

}  // namespace

extern const Kernel LPVIT_SYMBOL(LPVIT_INT8);
const Kernel LPVIT_SYMBOL(LPVIT_INT8) = {
    LPVIT_NAME(LPVIT_INT8), LPVIT_LANES, LPVIT_WIDEST, kStep, run, fma_loop, &preparation, kWeightLevels};

}  // namespace lpvit
