// What the attention's task splitter (attention.cpp) and its tiles (attention_tile.cpp, compiled once
// per instruction set) share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lpvit {

// Queries, keys and values of all heads, as one linear layer leaves them: each token's row holds
// heads * head_dim queries, then as many keys, then as many values.
struct Attention {
    const float* qkv;  // (tokens, 3 * heads * head_dim)
    float* out;        // (tokens, heads * head_dim)
    int64_t tokens;
    int32_t heads;
    int32_t head_dim;
    float scale;
};

struct AttentionKernel {
    int32_t lanes;  // head_dim must be a multiple of it
    // Floats of scratch memory that `run` needs for one head, 64-byte aligned.
    std::size_t (*scratch_floats)(int64_t tokens, int32_t head_dim);
    // Computes the queries [first, last) of one head.
    void (*run)(const Attention&, int32_t head, int64_t first, int64_t last, float* scratch);
};

#if defined(LPVIT_ONLY_PORTABLE)
#elif defined(__x86_64__)
extern const AttentionKernel avx512_bf16_attention;
extern const AttentionKernel avx512_attention;
extern const AttentionKernel avx2_attention;
#elif defined(__aarch64__)
extern const AttentionKernel neon_attention;
#endif
extern const AttentionKernel portable_attention;

}  // namespace lpvit
