// Packing, choice of the instruction set, and the splitting of a layer into even tasks.
#include "layer.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "kernel.h"

namespace lpvit {
namespace {

// Tokens worked on together: their rows of X should stay in a core's second-level cache while every
// block row of weights goes by, but each further token block reads all weights again. On a core with
// 1 MiB of that cache, 1 MiB here was 4 % faster over DeiT-B's layers than 384 KiB, 128 KiB slower.
constexpr int64_t kTokenBytes = 1024 * 1024;
// A tile pays this many columns' worth of time before its first one (bias, epilogue, stores).
constexpr int64_t kTileOverhead = 16;
constexpr int64_t kTasksPerThread = 4;
// Below this many multiply-adds a second thread costs more than it brings (about 20 us).
constexpr int64_t kSerialMacs = 400 * 1000;
constexpr std::size_t kAlignment = 64;

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float, Free>;

Floats zeros(std::size_t count) {
    const std::size_t bytes = (std::max<std::size_t>(count, 1) * sizeof(float) + kAlignment - 1) /
                              kAlignment * kAlignment;
    auto* memory = static_cast<float*>(std::aligned_alloc(kAlignment, bytes));
    if (memory == nullptr) throw std::bad_alloc();
    std::memset(memory, 0, bytes);
    return Floats(memory);
}

const Kernel* find_kernel(const char* isa) {
    if (std::strcmp(isa, "portable") == 0) return &portable_kernel;
#if defined(LPVIT_ONLY_PORTABLE)
#elif defined(__x86_64__)
    if (std::strcmp(isa, "avx512") == 0 && __builtin_cpu_supports("avx512f")) return &avx512_kernel;
    if (std::strcmp(isa, "avx2") == 0 && __builtin_cpu_supports("avx2") &&
        __builtin_cpu_supports("fma"))
        return &avx2_kernel;
#elif defined(__aarch64__)
    if (std::strcmp(isa, "neon") == 0) return &neon_kernel;  // part of every ARMv8-A
#endif
    return nullptr;
}

}  // namespace
}  // namespace lpvit

struct LpvitLayer {
    const lpvit::Kernel* kernel;
    int64_t in_features;
    int64_t out_features;
    int32_t block_cols;
    lpvit::Activation activation;
    std::vector<int32_t> columns;
    std::vector<lpvit::Strip> strips;
    std::vector<std::size_t> first_strip;  // of each block row, and the end
    std::vector<int64_t> cost;  // cost[r]: of all block rows before r, for one chunk of tokens
    lpvit::Floats weights;
    lpvit::Floats bias;
    std::size_t floats;
    int64_t macs_per_token;
};

namespace lpvit {
namespace {

// Cuts a block row into strips, the widest that fit first; the last one may be padded.
void add_strips(LpvitLayer& layer, const LpvitMatrix& matrix, int32_t block_row) {
    const int32_t lanes = layer.kernel->lanes;
    const int32_t first_block = matrix.row_ptr[block_row];
    layer.first_strip.push_back(layer.strips.size());
    for (int32_t done = 0; done < matrix.block_rows;) {
        int32_t vectors = layer.kernel->widest;
        while (vectors > 1 && done + vectors * lanes > matrix.block_rows) vectors /= 2;
        const int32_t outputs = std::min(vectors * lanes, matrix.block_rows - done);
        Strip strip = {};
        strip.columns = layer.columns.data() + first_block;
        strip.blocks = matrix.row_ptr[block_row + 1] - first_block;
        strip.first_output = block_row * matrix.block_rows + done;
        strip.outputs = outputs;
        strip.vectors = vectors;
        layer.strips.push_back(strip);
        done += outputs;
    }
}

// Copies the strip's slice of every block, transposed: columns outermost, outputs contiguous.
void pack_strip(const Strip& strip, const LpvitMatrix& matrix, int32_t lanes, float* weights,
                float* bias) {
    const int32_t width = strip.vectors * lanes;
    const int32_t block_row = strip.first_output / matrix.block_rows;
    const int32_t row = strip.first_output % matrix.block_rows;
    for (int32_t block = 0; block < strip.blocks; ++block) {
        const int64_t stored = matrix.row_ptr[block_row] + block;
        const float* values =
            matrix.values + (stored * matrix.block_rows + row) * matrix.block_cols;
        for (int32_t c = 0; c < matrix.block_cols; ++c, weights += width)
            for (int32_t r = 0; r < strip.outputs; ++r)
                weights[r] = values[int64_t{r} * matrix.block_cols + c];
    }
    if (matrix.bias != nullptr)
        std::copy_n(matrix.bias + strip.first_output, strip.outputs, bias);
}

std::size_t strip_floats(const LpvitLayer& layer, const Strip& strip) {
    return std::size_t(strip.vectors * layer.kernel->lanes) * strip.blocks * layer.block_cols;
}

// Lays the strips out one after the other and fills them.
void pack(LpvitLayer& layer, const LpvitMatrix& matrix) {
    const int32_t lanes = layer.kernel->lanes;
    std::size_t weights = 0, bias = 0;
    for (const Strip& strip : layer.strips) {
        weights += strip_floats(layer, strip);
        bias += strip.vectors * lanes;
    }
    layer.weights = zeros(weights);
    layer.bias = zeros(bias);
    layer.floats = weights + bias;
    float* next_weights = layer.weights.get();
    float* next_bias = layer.bias.get();
    for (Strip& strip : layer.strips) {
        pack_strip(strip, matrix, lanes, next_weights, next_bias);
        strip.weights = next_weights;
        strip.bias = next_bias;
        next_weights += strip_floats(layer, strip);
        next_bias += strip.vectors * lanes;
    }
}

// Adds up what each block row costs, one after the other.
void add_costs(LpvitLayer& layer) {
    layer.cost.push_back(0);
    for (std::size_t row = 0; row + 1 < layer.first_strip.size(); ++row) {
        int64_t cost = layer.cost.back();
        for (std::size_t s = layer.first_strip[row]; s < layer.first_strip[row + 1]; ++s) {
            const Strip& strip = layer.strips[s];
            const int64_t columns = int64_t{strip.blocks} * layer.block_cols;
            cost += (columns + kTileOverhead) * strip.vectors;
            layer.macs_per_token += columns * strip.vectors * layer.kernel->lanes;
        }
        layer.cost.push_back(cost);
    }
}

// One call of a layer. Its work is a line of (token block, block row, chunk of tokens) units, in this
// order, each as long as it costs; a task is an even slice of that line. So a layer with few or
// uneven block rows still keeps every thread busy.
struct Call {
    const LpvitLayer* layer;
    Operands operands;
    int64_t tokens;
    int64_t chunks;
    int64_t chunks_per_block;
    int64_t tasks;

    int64_t length() const { return layer->cost.back() * chunks; }
    void run_task(int64_t index) const;
    void run_block(int64_t first_chunk, int64_t chunk_count, int64_t begin, int64_t end) const;
};

// The units of one token block whose start lies in [begin, end), counted from the block's start.
void Call::run_block(int64_t first_chunk, int64_t chunk_count, int64_t begin, int64_t end) const {
    const std::vector<int64_t>& cost = layer->cost;
    const auto after = std::upper_bound(cost.begin(), cost.end(), begin / chunk_count);
    for (std::size_t row = after - cost.begin() - 1; row + 1 < cost.size(); ++row) {
        const int64_t start = cost[row] * chunk_count;
        if (start >= end) break;
        const int64_t unit = cost[row + 1] - cost[row];
        const int64_t from = begin <= start ? 0 : (begin - start + unit - 1) / unit;
        const int64_t to = std::min(chunk_count, (end - start + unit - 1) / unit);
        if (from >= to) continue;
        const int64_t last = std::min((first_chunk + to) * kChunk, tokens);
        const std::size_t first = layer->first_strip[row];
        const auto count = static_cast<int32_t>(layer->first_strip[row + 1] - first);
        layer->kernel->run(&layer->strips[first], count, operands, (first_chunk + from) * kChunk,
                           last, layer->block_cols, layer->activation);
    }
}

void Call::run_task(int64_t index) const {
    const int64_t begin = length() * index / tasks;
    const int64_t end = length() * (index + 1) / tasks;
    const int64_t per_chunk = layer->cost.back();
    for (int64_t chunk = 0; chunk < chunks; chunk += chunks_per_block) {
        const int64_t count = std::min(chunks_per_block, chunks - chunk);
        const int64_t start = per_chunk * chunk;
        const int64_t from = std::max(begin - start, int64_t{0});
        const int64_t to = std::min(end - start, per_chunk * count);
        if (from < to) run_block(chunk, count, from, to);
    }
}

int64_t task_count(const LpvitLayer& layer, const LpvitThreads* threads, int64_t tokens) {
    if (threads == nullptr || layer.macs_per_token * tokens < kSerialMacs) return 1;
    const int64_t concurrency = threads->concurrency();
    return concurrency > 1 ? concurrency * kTasksPerThread : 1;
}

}  // namespace
}  // namespace lpvit

int32_t lpvit_supports(const char* isa) { return lpvit::find_kernel(isa) != nullptr; }

LpvitLayer* lpvit_create(const LpvitMatrix* matrix, const char* isa) try {
    const lpvit::Kernel* kernel = lpvit::find_kernel(isa);
    if (kernel == nullptr) return nullptr;
    auto layer = std::make_unique<LpvitLayer>();
    layer->kernel = kernel;
    layer->in_features = matrix->in_features;
    layer->out_features = matrix->out_features;
    layer->block_cols = matrix->block_cols;
    layer->activation = static_cast<lpvit::Activation>(matrix->activation);
    const int32_t block_rows = matrix->out_features / matrix->block_rows;
    layer->columns.assign(matrix->col_idx, matrix->col_idx + matrix->row_ptr[block_rows]);
    for (int32_t& column : layer->columns) column *= matrix->block_cols;
    for (int32_t row = 0; row < block_rows; ++row) lpvit::add_strips(*layer, *matrix, row);
    layer->first_strip.push_back(layer->strips.size());
    lpvit::pack(*layer, *matrix);
    lpvit::add_costs(*layer);
    return layer.release();
} catch (const std::bad_alloc&) {
    return nullptr;
}

void lpvit_destroy(LpvitLayer* layer) { delete layer; }

int64_t lpvit_bytes(const LpvitLayer* layer) {
    return layer->floats * sizeof(float) + layer->columns.size() * sizeof(int32_t);
}

void lpvit_run(const LpvitLayer* layer, const LpvitThreads* threads, const float* x,
               int64_t tokens, float* y) {
    const int64_t token_bytes = layer->in_features * sizeof(float);
    lpvit::Call call = {};
    call.layer = layer;
    call.operands = {x, y, std::size_t(layer->in_features), std::size_t(layer->out_features)};
    call.tokens = tokens;
    call.chunks = (tokens + lpvit::kChunk - 1) / lpvit::kChunk;
    call.chunks_per_block =
        std::max<int64_t>(1, lpvit::kTokenBytes / (token_bytes * lpvit::kChunk));
    call.tasks = lpvit::task_count(*layer, threads, tokens);
    if (call.tasks == 1) return call.run_task(0);
    threads->run(
        static_cast<int>(call.tasks),
        [](void* context, int index) { static_cast<const lpvit::Call*>(context)->run_task(index); },
        &call);
}

int64_t lpvit_fma_loop(const char* isa, int64_t rounds) {
    const lpvit::Kernel* kernel = lpvit::find_kernel(isa);
    return kernel == nullptr ? 0 : kernel->fma_loop(rounds);
}
