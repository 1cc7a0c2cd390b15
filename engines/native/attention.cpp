// Choice of the instruction set for the attention, and its splitting into tasks.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "layer.h"

namespace lpvit {
namespace {

constexpr std::size_t kAlignment = 64;
// Each task transposes its head's keys again, so a head is cut only as far as the threads need.
constexpr int64_t kTasksPerThread = 2;

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};

struct Call {
    const AttentionKernel* kernel;
    Attention attention;
    int64_t parts;  // of each head
    std::size_t scratch_bytes;
    std::atomic<bool>* out_of_memory;  // several tasks may find it

    void run_task(int64_t index) const {
        std::unique_ptr<float, Free> scratch(
            static_cast<float*>(std::aligned_alloc(kAlignment, scratch_bytes)));
        if (scratch == nullptr) {
            *out_of_memory = true;
            return;
        }
        const int64_t part = index % parts, tokens = attention.tokens;
        kernel->run(attention, static_cast<int32_t>(index / parts), tokens * part / parts,
                    tokens * (part + 1) / parts, scratch.get());
    }
};

const AttentionKernel* find_attention(const char* isa) {
    if (!lpvit_supports(isa)) return nullptr;
#if defined(LPVIT_ONLY_PORTABLE)
#elif defined(__x86_64__)
    if (std::strcmp(isa, "avx512_bf16") == 0) return &avx512_bf16_attention;
    if (std::strcmp(isa, "avx512") == 0) return &avx512_attention;
    if (std::strcmp(isa, "avx2") == 0) return &avx2_attention;
#elif defined(__aarch64__)
    if (std::strcmp(isa, "neon") == 0) return &neon_attention;
#endif
    return std::strcmp(isa, "portable") == 0 ? &portable_attention : nullptr;
}

}  // namespace
}  // namespace lpvit

const void* lpvit_attention_kernel(const char* isa, int32_t head_dim) {
    const lpvit::AttentionKernel* kernel = lpvit::find_attention(isa);
    return kernel != nullptr && head_dim % kernel->lanes == 0 ? kernel : nullptr;
}

int32_t lpvit_attention(const void* kernel, const LpvitThreads* threads, const float* qkv,
                        int64_t tokens, int32_t heads, int32_t head_dim, float scale, float* out) {
    std::atomic<bool> out_of_memory = false;
    lpvit::Call call = {};
    call.kernel = static_cast<const lpvit::AttentionKernel*>(kernel);
    call.attention = {qkv, out, tokens, heads, head_dim, scale};
    call.scratch_bytes = (call.kernel->scratch_floats(tokens, head_dim) * sizeof(float) +
                          lpvit::kAlignment - 1) /
                         lpvit::kAlignment * lpvit::kAlignment;
    call.out_of_memory = &out_of_memory;
    const int64_t wanted = threads == nullptr ? 1 : threads->concurrency() * lpvit::kTasksPerThread;
    call.parts = wanted > 2 ? std::max<int64_t>(1, (wanted + heads - 1) / heads) : 1;
    const auto task = [](void* context, int index) {
        static_cast<const lpvit::Call*>(context)->run_task(index);
    };
    const int tasks = static_cast<int>(heads * call.parts);
    if (threads != nullptr)
        threads->run(tasks, task, &call);
    else
        for (int index = 0; index < tasks; ++index) task(&call, index);
    return out_of_memory ? 1 : 0;
}
