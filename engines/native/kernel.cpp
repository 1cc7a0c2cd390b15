// The block-sparse tile, written over the compiler's vector extensions and compiled once per
// instruction set (hatch_build.py passes the flags and the three macros):
//   LPVIT_ISA     name of the instruction set, as in LPVIT_ISA=avx2
//   LPVIT_LANES   floats in one register
//   LPVIT_WIDEST  registers across the widest strip: 2 where there are 16 registers, 4 where 32
// No standard header is used for code here: an inline function compiled with AVX flags could be
// the copy that the linker keeps for every caller, on a machine without AVX as well.
#include "gelu.h"
#include "kernel.h"

#define LPVIT_JOIN(a, b) a##b
#define LPVIT_SYMBOL(isa) LPVIT_JOIN(isa, _kernel)
#define LPVIT_TEXT(isa) #isa
#define LPVIT_NAME(isa) LPVIT_TEXT(isa)
// Accumulators live in registers only if every loop over them is unrolled.
#define LPVIT_UNROLL _Pragma("GCC unroll 16")

namespace lpvit {
namespace {

typedef float Vector __attribute__((vector_size(4 * LPVIT_LANES)));
typedef float Loose __attribute__((vector_size(4 * LPVIT_LANES), aligned(4), may_alias));

constexpr int kLineFloats = 16;
// 4 KiB ahead: 9 to 13 % off the linear layers of DeiT-B, whose weights do not stay in a cache;
// 2 KiB and 8 KiB ahead gave less.
constexpr int kPrefetchFloats = 1024;

// Tile heights that fill the registers: rows * vectors accumulators, the weights, one broadcast.
constexpr int tile_rows(int vectors) { return vectors < LPVIT_WIDEST ? 12 : 6; }

// The tile's outputs, which lie in the first-level cache now; a loop here keeps the tile small.
template <int ROWS, int VECTORS>
void apply_gelu(float* y, std::size_t y_stride) {
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < VECTORS; ++v) {
            // Not `auto*`: deduction drops the type's alignment, and the load then demands 32 bytes.
            Loose* const at = reinterpret_cast<Loose*>(y + i * y_stride + v * LPVIT_LANES);
            *at = gelu(*at);
        }
}

// One tile: ROWS tokens by VECTORS registers of outputs stay in registers while every stored
// block goes by. COLS is the blocks' width where it is known at compile time (1), otherwise 0.
template <int ROWS, int VECTORS, int COLS>
void tile(const Strip& strip, const Operands& at, int64_t token, int32_t block_cols,
          Activation activation) {
    const float* x = static_cast<const float*>(at.x) + token * at.x_stride;
    const float* w = strip.weights;
    const int32_t cols = COLS ? COLS : block_cols;
    Vector sum[ROWS][VECTORS];
    LPVIT_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        const Vector bias = *reinterpret_cast<const Loose*>(strip.bias + v * LPVIT_LANES);
        LPVIT_UNROLL
        for (int i = 0; i < ROWS; ++i) sum[i][v] = bias;
    }
    for (int32_t block = 0; block < strip.blocks; ++block) {
        const float* xb = x + strip.columns[block];
        for (int32_t c = 0; c < cols; ++c, w += VECTORS * LPVIT_LANES) {
            // Weights come once per call from far away, faster than a prefetcher looks ahead.
            for (int line = 0; line < VECTORS * LPVIT_LANES; line += kLineFloats)
                __builtin_prefetch(w + kPrefetchFloats + line, 0, 2);
            Vector weights[VECTORS];
            LPVIT_UNROLL
            for (int v = 0; v < VECTORS; ++v)
                weights[v] = *reinterpret_cast<const Loose*>(w + v * LPVIT_LANES);
            LPVIT_UNROLL
            for (int i = 0; i < ROWS; ++i) {
                const float value = xb[i * at.x_stride + c];
                LPVIT_UNROLL
                for (int v = 0; v < VECTORS; ++v) sum[i][v] += value * weights[v];
            }
        }
    }
    constexpr int width = VECTORS * LPVIT_LANES;
    float padded[ROWS * width];  // only a strip with fewer outputs than lanes goes through it
    const bool is_whole = strip.outputs == width;
    float* const y = static_cast<float*>(at.y) + token * at.y_stride + strip.first_output;
    float* const to = is_whole ? y : padded;
    const std::size_t stride = is_whole ? at.y_stride : width;
    LPVIT_UNROLL
    for (int i = 0; i < ROWS; ++i)
        LPVIT_UNROLL
        for (int v = 0; v < VECTORS; ++v)
            *reinterpret_cast<Loose*>(to + i * stride + v * LPVIT_LANES) = sum[i][v];
    if (activation == kGelu) apply_gelu<ROWS, VECTORS>(to, stride);
    if (!is_whole)
        for (int i = 0; i < ROWS; ++i)
            for (int32_t r = 0; r < strip.outputs; ++r) y[i * at.y_stride + r] = padded[i * width + r];
}

// A tile whose height is known only at run time: count down to its instance.
template <int ROWS, int VECTORS, int COLS>
void tile_of(int64_t rows, const Strip& strip, const Operands& at, int64_t token,
             int32_t block_cols, Activation activation) {
    if (rows == ROWS) {
        tile<ROWS, VECTORS, COLS>(strip, at, token, block_cols, activation);
    } else if constexpr (ROWS > 1) {
        tile_of<ROWS - 1, VECTORS, COLS>(rows, strip, at, token, block_cols, activation);
    }
}

template <int VECTORS, int COLS>
void run_tiles(const Strip& strip, const Operands& at, int64_t first, int64_t last,
               int32_t block_cols, Activation activation) {
    constexpr int rows = tile_rows(VECTORS);
    int64_t token = first;
    for (; token + rows <= last; token += rows)
        tile<rows, VECTORS, COLS>(strip, at, token, block_cols, activation);
    if (token < last)
        tile_of<rows - 1, VECTORS, COLS>(last - token, strip, at, token, block_cols, activation);
}

template <int COLS>
void run_strips(const Strip* strips, int32_t count, const Operands& at, int64_t first, int64_t last,
                int32_t block_cols, Activation activation) {
    // A few tokens at a time pass all strips of the block row: their rows of X then come from the
    // first-level cache for all strips but one. Weights stream, which the prefetcher sees through.
    const int64_t step = tile_rows(strips->vectors);
    for (int64_t token = first; token < last; token += step) {
        const int64_t end = token + step < last ? token + step : last;
        for (const Strip* strip = strips; strip != strips + count; ++strip) {
            if (strip->vectors == 1)
                run_tiles<1, COLS>(*strip, at, token, end, block_cols, activation);
            else if (strip->vectors == 2)
                run_tiles<2, COLS>(*strip, at, token, end, block_cols, activation);
#if LPVIT_WIDEST == 4
            else
                run_tiles<4, COLS>(*strip, at, token, end, block_cols, activation);
#endif
        }
    }
}

void run(const Strip* strips, int32_t count, const Operands& at, int64_t first, int64_t last,
         int32_t block_cols, Activation activation) {
    if (block_cols == 1)
        run_strips<1>(strips, count, at, first, last, block_cols, activation);
    else
        run_strips<0>(strips, count, at, first, last, block_cols, activation);
}

int64_t fma_loop(int64_t rounds) {
    constexpr int chains = 12;  // enough to hide the latency of one multiply-add
    Vector sum[chains] = {};
    const Vector factor = sum[0] + 0.5f;
    LPVIT_UNROLL
    for (int i = 0; i < chains; ++i) sum[i] += float(i);
    for (int64_t round = 0; round < rounds; ++round) {
        LPVIT_UNROLL
        for (int i = 0; i < chains; ++i) sum[i] = sum[i] * factor + factor;
        asm volatile("" ::: "memory");  // so that the rounds are not folded into one
    }
    LPVIT_UNROLL
    for (int i = 1; i < chains; ++i) sum[0] += sum[i];
    volatile float keep = sum[0][0];
    (void)keep;
    return rounds * chains * LPVIT_LANES * 2;
}

}  // namespace

extern const Kernel LPVIT_SYMBOL(LPVIT_ISA);
const Kernel LPVIT_SYMBOL(LPVIT_ISA) = {LPVIT_NAME(LPVIT_ISA), LPVIT_LANES, LPVIT_WIDEST, 1, run,
                                       fma_loop, nullptr, 0};

}  // namespace lpvit
