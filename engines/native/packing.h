// A packed layer, which packing.cpp makes and layer.cpp runs.
#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#include "kernel.h"
#include "layer.h"

namespace lpvit {

constexpr std::size_t kAlignment = 64;

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float, Free>;

inline std::size_t aligned(std::size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Null for a name that no kernel has, and for one that this machine cannot run.
const Kernel* find_kernel(const char* isa);

}  // namespace lpvit

struct LpvitLayer {
    const lpvit::Kernel* kernel;
    int64_t in_features;
    int64_t out_features;
    int32_t width;  // what the kernel's `run` takes by that name
    lpvit::Activation activation;
    std::vector<int32_t> columns;
    std::vector<lpvit::Strip> strips;
    std::vector<std::size_t> first_strip;  // of each block row, and the end
    std::vector<int64_t> cost;  // cost[r]: of all block rows before r, for one chunk of tokens
    lpvit::Floats weights;
    lpvit::Floats bias;
    std::size_t floats;
    int64_t macs_per_token;
    int64_t most_steps;  // of a block row
};

namespace lpvit {

// Fills a new layer for one kernel; throws std::bad_alloc.
void pack_layer(LpvitLayer& layer, const LpvitMatrix& matrix, const Kernel& kernel);

}  // namespace lpvit
