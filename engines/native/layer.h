// The C interface that ctypes calls. Whoever calls it has validated its arguments
// (lpvit_engines/block_sparse.py does); nothing here reads past what the sizes promise.
#pragma once

#include <cstdint>

extern "C" {
#pragma GCC visibility push(default)

// Raised with every change of what the three libraries and Python hand each other: Python refuses a
// library of another number, which would compute nonsense (INTERFACE in lpvit_engines/native.py).
#define LPVIT_INTERFACE 3
int32_t lpvit_interface();

// Runs task(context, i) for every i in [0, tasks), on `concurrency()` threads at most.
struct LpvitThreads {
    int (*concurrency)();
    void (*run)(int tasks, void (*task)(void* context, int index), void* context);
};

struct LpvitMatrix {
    const float* values;     // (blocks, block_rows, block_cols)
    const int32_t* row_ptr;  // (out_features / block_rows + 1)
    const int32_t* col_idx;  // (blocks), in block columns
    const float* bias;       // (out_features), or null
    int32_t in_features;
    int32_t out_features;
    int32_t block_rows;
    int32_t block_cols;
    int32_t activation;
};

struct LpvitLayer;

// 1 where this machine can run the instruction set, 0 where it cannot or none has that name.
int32_t lpvit_supports(const char* isa);
// Packs a copy of the matrix for one instruction set; null where memory or the set is missing.
LpvitLayer* lpvit_create(const LpvitMatrix* matrix, const char* isa);
void lpvit_destroy(LpvitLayer* layer);
// Bytes that a layer keeps.
int64_t lpvit_bytes(const LpvitLayer* layer);
// For a layer of a float32 instruction set:
// y (tokens, out_features) = act(x (tokens, in_features) W^T + bias); null threads: the caller's.
void lpvit_run(const LpvitLayer* layer, const LpvitThreads* threads, const float* x,
               int64_t tokens, float* y);
// The same for a layer of avx512_bf16, or of int8: x and y are float32 (element 0) or, for avx512_bf16
// alone, bfloat16 (1). 0, or 1 where memory ran out and y was not written.
int32_t lpvit_run_prepared(const LpvitLayer* layer, const LpvitThreads* threads, const void* x,
                           int64_t tokens, void* y, int32_t element);
// The attention of one instruction set for heads of that width; null where there is none.
const void* lpvit_attention_kernel(const char* isa, int32_t head_dim);
// out (tokens, heads * head_dim) = softmax(scale * Q K^T) V of each head, from qkv (tokens, 3 * heads
// * head_dim); null threads: the caller's. 0, or 1 where memory ran out and `out` is not complete.
int32_t lpvit_attention(const void* kernel, const LpvitThreads* threads, const float* qkv,
                        int64_t tokens, int32_t heads, int32_t head_dim, float scale, float* out);
// Runs multiply-adds on registers; returns how many operations that were, 0 without the set.
int64_t lpvit_fma_loop(const char* isa, int64_t rounds);
#pragma GCC visibility pop
}
