// Choice of the instruction set, and packing of a layer for it.
#include "packing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace lpvit {

namespace {

// A kernel, and whether the machine has what it needs.
struct Choice {
    const Kernel* kernel;
    bool is_here;
};

#if defined(LPVIT_ONLY_PORTABLE)
#elif defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
}
#elif defined(__aarch64__)
bool has_dotprod() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return false;
#endif
}
#endif

}  // namespace

const Kernel* find_kernel(const char* isa) {
    const Choice choices[] = {
        {&portable_kernel, true},
        {&portable_int8_kernel, true},
#if defined(LPVIT_ONLY_PORTABLE)
#elif defined(__x86_64__)
        {&avx2_kernel, has_avx2()},
        {&avx2_int8_kernel, has_avx2()},
        {&avx512_kernel, __builtin_cpu_supports("avx512f") != 0},
        {&avx512_bf16_kernel, has_avx512() && __builtin_cpu_supports("avx512bf16")},
        {&avx512_vnni_kernel, has_avx512() && __builtin_cpu_supports("avx512vnni")},
#elif defined(__aarch64__)
        {&neon_kernel, true},  // part of every ARMv8-A
        {&neon_int8_kernel, true},
        {&neon_dotprod_kernel, has_dotprod()},
#endif
    };
    for (const Choice& choice : choices)
        if (std::strcmp(choice.kernel->name, isa) == 0)
            return choice.is_here ? choice.kernel : nullptr;
    return nullptr;
}

namespace {

// A tile pays this many columns' worth of time before its first one (bias, epilogue, stores).
constexpr int64_t kTileOverhead = 16;

Floats zeros(std::size_t count) {
    const std::size_t bytes = aligned(std::max<std::size_t>(count, 1) * sizeof(float));
    auto* memory = static_cast<float*>(std::aligned_alloc(kAlignment, bytes));
    if (memory == nullptr) throw std::bad_alloc();
    std::memset(memory, 0, bytes);
    return Floats(memory);
}

// To the nearest bfloat16, to even in the middle; a NaN stays one.
uint16_t bfloat16(float value) {
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Input features of a strip's stored columns, padding included.
int64_t strip_columns(const LpvitLayer& layer, const Strip& strip) {
    return int64_t{strip.blocks} * (layer.kernel->preparation ? layer.kernel->step : layer.width);
}

// Fills `columns` for every block row; returns where each one's begin, and the end.
std::vector<std::size_t> list_columns(LpvitLayer& layer, const LpvitMatrix& matrix) {
    const int32_t block_rows = matrix.out_features / matrix.block_rows;
    const bool is_stepped = layer.kernel->preparation != nullptr;
    std::vector<std::size_t> first;
    for (int32_t row = 0; row < block_rows; ++row) {
        first.push_back(layer.columns.size());
        for (int32_t block = matrix.row_ptr[row]; block < matrix.row_ptr[row + 1]; ++block)
            for (int32_t c = 0; c < (is_stepped ? matrix.block_cols : 1); ++c)
                layer.columns.push_back(matrix.col_idx[block] * matrix.block_cols + c);
        // Zeros follow the features of a prepared X.
        while (is_stepped && (layer.columns.size() - first.back()) % layer.kernel->step != 0)
            layer.columns.push_back(matrix.in_features);
    }
    first.push_back(layer.columns.size());
    return first;
}

// Cuts a block row into strips, the widest that fit first; the last one may be padded.
void add_strips(LpvitLayer& layer, const LpvitMatrix& matrix, int32_t block_row,
                const int32_t* columns, int32_t blocks) {
    const int32_t lanes = layer.kernel->lanes;
    layer.first_strip.push_back(layer.strips.size());
    layer.most_steps = std::max<int64_t>(layer.most_steps, blocks);
    for (int32_t done = 0; done < matrix.block_rows;) {
        int32_t vectors = layer.kernel->widest;
        while (vectors > 1 && vectors * lanes > matrix.block_rows - done) vectors /= 2;
        const int32_t outputs = std::min(vectors * lanes, matrix.block_rows - done);
        Strip strip = {};
        strip.columns = columns;
        strip.blocks = blocks;
        strip.first_output = block_row * matrix.block_rows + done;
        strip.outputs = outputs;
        strip.vectors = vectors;
        layer.strips.push_back(strip);
        done += outputs;
    }
}

// The values of one output in the stored columns of its block row, one after the other.
template <class Visit>
void for_each_column(const LpvitMatrix& matrix, int32_t output, const Visit& visit) {
    const int32_t block_row = output / matrix.block_rows, row = output % matrix.block_rows;
    int64_t column = 0;
    for (int32_t block = matrix.row_ptr[block_row]; block < matrix.row_ptr[block_row + 1]; ++block) {
        const float* const values =
            matrix.values + (int64_t{block} * matrix.block_rows + row) * matrix.block_cols;
        for (int32_t c = 0; c < matrix.block_cols; ++c) visit(column++, values[c]);
    }
}

// Copies the strip's slice of every block, transposed: columns outermost, outputs contiguous; the
// columns of one step side by side in each output's word.
void pack_strip(const LpvitLayer& layer, const Strip& strip, const LpvitMatrix& matrix,
                float* weights) {
    const int32_t width = strip.vectors * layer.kernel->lanes, step = layer.kernel->step;
    for (int32_t r = 0; r < strip.outputs; ++r)
        for_each_column(matrix, strip.first_output + r, [&](int64_t c, float value) {
            float* const to = weights + c / step * width;
            if (step == 1)
                to[r] = value;
            else
                reinterpret_cast<uint16_t*>(to)[r * step + c % step] = bfloat16(value);
        });
}

// The same in int8, one scale for each output: its largest weight becomes the largest level. After
// the bias follow the scales and the sums of weights. What is not finite makes the scale NaN.
void pack_int8_strip(const LpvitLayer& layer, const Strip& strip, const LpvitMatrix& matrix,
                     float* weights, float* bias) {
    const int32_t width = strip.vectors * layer.kernel->lanes, step = layer.kernel->step;
    float* const scales = bias + width;
    auto* const sums = reinterpret_cast<int32_t*>(scales + width);
    for (int32_t r = 0; r < strip.outputs; ++r) {
        const int32_t output = strip.first_output + r;
        float largest = 0, poison = 0;
        for_each_column(matrix, output, [&](int64_t, float value) {
            largest = std::max(largest, std::fabs(value));
            poison += value * 0.0f;
        });
        const double levels = layer.kernel->weight_levels;
        const double factor = poison == 0.0f && largest > 0 ? levels / largest : 0.0;
        scales[r] = poison == 0.0f ? static_cast<float>(largest / levels) : poison;
        for_each_column(matrix, output, [&](int64_t c, float value) {
            const auto q = static_cast<int8_t>(factor == 0.0 ? 0 : std::lrint(value * factor));
            reinterpret_cast<int8_t*>(weights + c / step * width)[r * step + c % step] = q;
            sums[r] += q;
        });
    }
}

std::size_t strip_floats(const LpvitLayer& layer, const Strip& strip) {
    return std::size_t(strip.vectors * layer.kernel->lanes) * strip_columns(layer, strip) /
           layer.kernel->step;
}

// Bias, and for int8 scales and sums.
std::size_t strip_constants(const LpvitLayer& layer, const Strip& strip) {
    return std::size_t(strip.vectors * layer.kernel->lanes) * (layer.kernel->weight_levels ? 3 : 1);
}

// Lays the strips out one after the other and fills them.
void pack(LpvitLayer& layer, const LpvitMatrix& matrix) {
    std::size_t weights = 0, bias = 0;
    for (const Strip& strip : layer.strips) {
        weights += strip_floats(layer, strip);
        bias += strip_constants(layer, strip);
    }
    layer.weights = zeros(weights);
    layer.bias = zeros(bias);
    layer.floats = weights + bias;
    float* next_weights = layer.weights.get();
    float* next_bias = layer.bias.get();
    for (Strip& strip : layer.strips) {
        if (layer.kernel->weight_levels)
            pack_int8_strip(layer, strip, matrix, next_weights, next_bias);
        else
            pack_strip(layer, strip, matrix, next_weights);
        if (matrix.bias != nullptr)
            std::copy_n(matrix.bias + strip.first_output, strip.outputs, next_bias);
        strip.weights = next_weights;
        strip.bias = next_bias;
        next_weights += strip_floats(layer, strip);
        next_bias += strip_constants(layer, strip);
    }
}

// Adds up what each block row costs, one after the other.
void add_costs(LpvitLayer& layer) {
    layer.cost.push_back(0);
    for (std::size_t row = 0; row + 1 < layer.first_strip.size(); ++row) {
        int64_t cost = layer.cost.back();
        for (std::size_t s = layer.first_strip[row]; s < layer.first_strip[row + 1]; ++s) {
            const Strip& strip = layer.strips[s];
            const int64_t columns = strip_columns(layer, strip);
            cost += (columns + kTileOverhead) * strip.vectors;
            layer.macs_per_token += columns * strip.vectors * layer.kernel->lanes;
        }
        layer.cost.push_back(cost);
    }
}

}  // namespace

void pack_layer(LpvitLayer& layer, const LpvitMatrix& matrix, const Kernel& kernel) {
    layer.kernel = &kernel;
    layer.in_features = matrix.in_features;
    layer.out_features = matrix.out_features;
    layer.width = kernel.preparation ? matrix.in_features : matrix.block_cols;
    layer.activation = static_cast<Activation>(matrix.activation);
    const std::vector<std::size_t> first = list_columns(layer, matrix);
    for (std::size_t row = 0; row + 1 < first.size(); ++row) {
        const auto entries = static_cast<int32_t>(first[row + 1] - first[row]);
        add_strips(layer, matrix, static_cast<int32_t>(row), layer.columns.data() + first[row],
                   kernel.preparation ? entries / kernel.step : entries);
    }
    layer.first_strip.push_back(layer.strips.size());
    pack(layer, matrix);
    add_costs(layer);
}

}  // namespace lpvit
