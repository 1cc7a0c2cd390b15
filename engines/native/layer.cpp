// The C interface, and the splitting of a layer into even tasks.
#include "layer.h"

#include <algorithm>
#include <memory>
#include <new>

#include "packing.h"

namespace lpvit {
namespace {

// Tokens worked on together: their rows of X should stay in a core's second-level cache while every
// block row of weights goes by, but each further token block reads all weights again. On a core with
// 1 MiB of that cache, 1 MiB here was 4 % faster over DeiT-B's layers than 384 KiB, 128 KiB slower.
constexpr int64_t kTokenBytes = 1024 * 1024;
constexpr int64_t kTasksPerThread = 4;
// Below this many multiply-adds a second thread costs more than it brings (about 20 us).
constexpr int64_t kSerialMacs = 400 * 1000;

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
    std::size_t scratch_bytes;  // of each task, from operands.scratch on

    int64_t length() const { return layer->cost.back() * chunks; }
    void run_task(int64_t index) const;
    void prepare(int64_t index) const;
    void run_block(const Operands& at, int64_t first_chunk, int64_t chunk_count, int64_t begin,
                   int64_t end) const;
};

// The units of one token block whose start lies in [begin, end), counted from the block's start.
void Call::run_block(const Operands& at, int64_t first_chunk, int64_t chunk_count, int64_t begin,
                     int64_t end) const {
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
        layer->kernel->run(&layer->strips[first], count, at, (first_chunk + from) * kChunk, last,
                           layer->width, layer->activation);
    }
}

void Call::run_task(int64_t index) const {
    const int64_t begin = length() * index / tasks;
    const int64_t end = length() * (index + 1) / tasks;
    const int64_t per_chunk = layer->cost.back();
    Operands at = operands;
    at.scratch = static_cast<char*>(operands.scratch) + index * scratch_bytes;
    for (int64_t chunk = 0; chunk < chunks; chunk += chunks_per_block) {
        const int64_t count = std::min(chunks_per_block, chunks - chunk);
        const int64_t start = per_chunk * chunk;
        const int64_t from = std::max(begin - start, int64_t{0});
        const int64_t to = std::min(end - start, per_chunk * count);
        if (from < to) run_block(at, chunk, count, from, to);
    }
}

// A task's part of the tokens, for the kernel to lay out.
void Call::prepare(int64_t index) const {
    const int64_t first = chunks * index / tasks * kChunk;
    const int64_t last = std::min(chunks * (index + 1) / tasks * kChunk, tokens);
    layer->kernel->preparation->prepare(operands, tokens, layer->in_features, first, last);
}

int64_t task_count(const LpvitLayer& layer, const LpvitThreads* threads, int64_t tokens) {
    if (threads == nullptr || layer.macs_per_token * tokens < kSerialMacs) return 1;
    const int64_t concurrency = threads->concurrency();
    return concurrency > 1 ? concurrency * kTasksPerThread : 1;
}

// Runs one member function for every task.
template <void (Call::*PART)(int64_t) const>
void run_all(const Call& call, const LpvitThreads* threads) {
    if (call.tasks == 1) return (call.*PART)(0);
    threads->run(
        static_cast<int>(call.tasks),
        [](void* context, int index) { (static_cast<const Call*>(context)->*PART)(index); },
        const_cast<Call*>(&call));
}

Call make_call(const LpvitLayer& layer, const LpvitThreads* threads, const void* x, int64_t tokens,
               void* y, Element element) {
    const Preparation* preparation = layer.kernel->preparation;
    const std::size_t chunk_bytes = preparation
                                        ? preparation->prepared_bytes(kChunk, layer.in_features)
                                        : layer.in_features * sizeof(float) * kChunk;
    Call call = {};
    call.layer = &layer;
    call.operands.x = x;
    call.operands.y = y;
    call.operands.x_stride = std::size_t(layer.in_features);
    call.operands.y_stride = std::size_t(layer.out_features);
    call.operands.element = element;
    call.tokens = tokens;
    call.chunks = (tokens + kChunk - 1) / kChunk;
    call.chunks_per_block = std::max<int64_t>(1, kTokenBytes / chunk_bytes);
    call.tasks = task_count(layer, threads, tokens);
    return call;
}

// False without memory for the copy of X.
bool run_prepared(Call call, const LpvitThreads* threads) {
    const Preparation& preparation = *call.layer->kernel->preparation;
    const std::size_t prepared =
        aligned(preparation.prepared_bytes(call.tokens, call.layer->in_features));
    call.scratch_bytes = aligned(preparation.scratch_bytes(call.layer->most_steps));
    const std::unique_ptr<void, Free> memory(
        std::aligned_alloc(kAlignment, prepared + call.tasks * call.scratch_bytes));
    if (memory == nullptr) return false;
    call.operands.prepared = memory.get();
    call.operands.scratch = static_cast<char*>(memory.get()) + prepared;
    run_all<&Call::prepare>(call, threads);
    run_all<&Call::run_task>(call, threads);
    return true;
}

}  // namespace
}  // namespace lpvit

int32_t lpvit_supports(const char* isa) { return lpvit::find_kernel(isa) != nullptr; }

LpvitLayer* lpvit_create(const LpvitMatrix* matrix, const char* isa) try {
    const lpvit::Kernel* kernel = lpvit::find_kernel(isa);
    if (kernel == nullptr) return nullptr;
    auto layer = std::make_unique<LpvitLayer>();
    lpvit::pack_layer(*layer, *matrix, *kernel);
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
    const lpvit::Call call = lpvit::make_call(*layer, threads, x, tokens, y, lpvit::kFloat32);
    lpvit::run_all<&lpvit::Call::run_task>(call, threads);
}

int32_t lpvit_run_prepared(const LpvitLayer* layer, const LpvitThreads* threads, const void* x,
                           int64_t tokens, void* y, int32_t element) {
    const lpvit::Call call = lpvit::make_call(*layer, threads, x, tokens, y,
                                              static_cast<lpvit::Element>(element));
    return lpvit::run_prepared(call, threads) ? 0 : 1;
}

int64_t lpvit_fma_loop(const char* isa, int64_t rounds) {
    const lpvit::Kernel* kernel = lpvit::find_kernel(isa);
    return kernel == nullptr ? 0 : kernel->fma_loop(rounds);
}

extern "C" int32_t lpvit_interface() { return LPVIT_INTERFACE; }
