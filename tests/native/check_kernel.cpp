// Compares the kernel's library with float64, on buffers of the exact size, so that a sanitizer
// sees every step outside. Prints one line per instruction set; exits 1 at the first difference.
#include <cmath>
#include <cstdio>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "layer.h"

namespace {

struct Case {
    int rows, cols, grid_rows, grid_cols, tokens;
    double density;
    int activation;
};

const Case kCases[] = {
    {1, 1, 9, 11, 3, 0.5, 1},    {4, 4, 3, 5, 7, 0.5, 0},     {8, 1, 4, 40, 13, 0.5, 1},
    {8, 8, 5, 5, 197, 0.3, 0},   {12, 1, 3, 17, 25, 0.5, 0},  {16, 16, 3, 4, 65, 0.5, 1},
    {20, 3, 3, 9, 31, 0.5, 1},   {32, 32, 3, 3, 65, 0.5, 0},  {40, 5, 3, 5, 6, 0.5, 0},
    {48, 1, 4, 50, 12, 0.5, 0},  {64, 1, 3, 192, 197, 0.2, 1}, {64, 16, 3, 12, 65, 0.5, 1},
    {64, 64, 2, 3, 1, 1.0, 0},   {64, 1, 12, 192, 65, 0.0, 1}, {72, 2, 2, 9, 5, 1.0, 0},
    {96, 1, 2, 3000, 40, 0.5, 0}, {100, 7, 2, 4, 11, 0.5, 1},
};

// Three threads in name; runs every task on the caller, last first.
int three() { return 3; }
void backwards(int tasks, void (*task)(void*, int), void* context) {
    for (int index = tasks - 1; index >= 0; --index) task(context, index);
}

struct Weights {
    std::vector<float> dense, values, bias;
    std::vector<int32_t> row_ptr, col_idx;
};

// What the numbers are made of, so that only sums differ from float64.
enum Numbers { kFloat32, kBfloat16, kInt8 };

Numbers numbers_of(const char* isa) {
    if (std::strcmp(isa, "avx512_bf16") == 0) return kBfloat16;
    for (const char* name : {"avx512_vnni", "avx2_int8", "neon_dotprod", "neon_int8", "portable_int8"})
        if (std::strcmp(isa, name) == 0) return kInt8;
    return kFloat32;
}

// An int8 kernel finds the scale 1 where an output's largest weight is its largest level, and the
// numbers of a token reach from kLeast to kLeast + 255.
constexpr int kLeast = -100;
int most_weight(const char* isa) { return std::strcmp(isa, "avx2_int8") == 0 ? 63 : 127; }

// The nearest bfloat16, the even one in the middle.
float rounded(float value) {
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    std::memcpy(&value, &bits, sizeof bits);
    return value;
}

float draw(std::mt19937& random, Numbers numbers, int least, int most) {
    if (numbers == kInt8) return float(std::uniform_int_distribution<int>(least, most)(random));
    std::normal_distribution<float> normal;
    const float value = normal(random);
    return numbers == kBfloat16 ? rounded(value) : value;
}

std::vector<float> make_tokens(const Case& c, std::mt19937& random, Numbers numbers) {
    const int in = c.grid_cols * c.cols;
    std::vector<float> x(std::size_t(c.tokens) * in);
    for (float& value : x) value = draw(random, numbers, kLeast, kLeast + 255);
    for (int m = 0; numbers == kInt8 && m < c.tokens; ++m) {
        x[std::size_t(m) * in] = float(kLeast);
        x[std::size_t(m) * in + in - 1] = float(kLeast + 255);
    }
    return x;
}

Weights make_weights(const Case& c, std::mt19937& random, Numbers numbers, int most) {
    std::uniform_real_distribution<double> uniform;
    const int in = c.grid_cols * c.cols;
    Weights w;
    w.dense.assign(std::size_t(c.grid_rows) * c.rows * in, 0.0f);
    w.row_ptr.push_back(0);
    for (int i = 0; i < c.grid_rows; ++i) {
        for (int j = 0; j < c.grid_cols; ++j) {
            if (uniform(random) >= c.density || (i == 1 && c.density < 1)) continue;
            w.col_idx.push_back(j);
            for (int r = 0; r < c.rows; ++r)
                for (int k = 0; k < c.cols; ++k) {
                    const bool is_first = k == 0 && int(w.col_idx.size()) == w.row_ptr.back() + 1;
                    const float value = numbers == kInt8 && is_first
                                            ? float(most)
                                            : draw(random, numbers, -most, most);
                    w.values.push_back(value);
                    w.dense[(std::size_t(i) * c.rows + r) * in + j * c.cols + k] = value;
                }
        }
        w.row_ptr.push_back(static_cast<int32_t>(w.col_idx.size()));
    }
    for (int n = 0; n < c.grid_rows * c.rows; ++n) w.bias.push_back(draw(random, kFloat32, 0, 0));
    return w;
}

double expected(const Case& c, const Weights& w, const float* x, int n, double* scale) {
    const int in = c.grid_cols * c.cols;
    double sum = w.bias[n];
    *scale = std::fabs(sum) + 1;
    for (int k = 0; k < in; ++k) {
        const double product = double(x[k]) * w.dense[std::size_t(n) * in + k];
        sum += product;
        *scale += std::fabs(product);
    }
    return c.activation ? 0.5 * sum * (1 + std::erf(sum / std::sqrt(2.0))) : sum;
}

// From and to float32, which fills y, and from and to bfloat16, which must give the same rounded.
bool run_bfloat16(const LpvitLayer* layer, const LpvitThreads* threads, const Case& c,
                  const std::vector<float>& x, std::vector<float>& y) {
    if (lpvit_run_prepared(layer, threads, x.data(), c.tokens, y.data(), 0) != 0) return false;
    std::vector<uint16_t> short_x(x.size()), short_y(y.size());
    for (std::size_t i = 0; i < x.size(); ++i)
        std::memcpy(&short_x[i], reinterpret_cast<const char*>(&x[i]) + 2, 2);
    if (lpvit_run_prepared(layer, threads, short_x.data(), c.tokens, short_y.data(), 1) != 0)
        return false;
    for (std::size_t i = 0; i < y.size(); ++i) {
        const float right = rounded(y[i]);
        if (std::memcmp(&short_y[i], reinterpret_cast<const char*>(&right) + 2, 2) != 0) {
            std::printf("%dx%d tokens %d: bfloat16 %zu differs\n", c.rows, c.cols, c.tokens, i);
            return false;
        }
    }
    return true;
}

bool run(const LpvitLayer* layer, const LpvitThreads* threads, Numbers numbers, const Case& c,
         const std::vector<float>& x, std::vector<float>& y) {
    if (numbers == kBfloat16) return run_bfloat16(layer, threads, c, x, y);
    if (numbers == kInt8)
        return lpvit_run_prepared(layer, threads, x.data(), c.tokens, y.data(), 0) == 0;
    lpvit_run(layer, threads, x.data(), c.tokens, y.data());
    return true;
}

bool check(const Case& c, const char* isa, const LpvitThreads* threads, std::mt19937& random) {
    const Numbers numbers = numbers_of(isa);
    const Weights w = make_weights(c, random, numbers, most_weight(isa));
    const int in = c.grid_cols * c.cols, out = c.grid_rows * c.rows;
    const std::vector<float> x = make_tokens(c, random, numbers);
    std::vector<float> y(std::size_t(c.tokens) * out, NAN);
    const LpvitMatrix matrix = {w.values.data(), w.row_ptr.data(), w.col_idx.data(), w.bias.data(),
                                in, out, c.rows, c.cols, c.activation};
    LpvitLayer* layer = lpvit_create(&matrix, isa);
    if (layer == nullptr) return false;
    const bool is_whole = run(layer, threads, numbers, c, x, y);
    lpvit_destroy(layer);
    if (!is_whole) return false;
    for (int m = 0; m < c.tokens; ++m)
        for (int n = 0; n < out; ++n) {
            double scale = 0;
            const double right = expected(c, w, &x[std::size_t(m) * in], n, &scale);
            const double got = y[std::size_t(m) * out + n];
            if (!(std::fabs(got - right) <= 2e-6 * scale)) {
                std::printf("%s %dx%d tokens %d: y[%d][%d] is %g, not %g\n", isa, c.rows, c.cols,
                            c.tokens, m, n, got, right);
                return false;
            }
        }
    return true;
}

struct Heads {
    int tokens, heads, head_dim;
};

const Heads kHeads[] = {{197, 2, 64}, {1, 1, 16}, {49, 3, 32}, {67, 2, 48}, {6, 1, 16}};

// softmax(Q K^T / sqrt(head_dim)) V of one query and head.
std::vector<double> expected_attention(const Heads& c, const std::vector<float>& qkv, int token,
                                       int head) {
    const std::size_t width = std::size_t(c.heads) * c.head_dim;
    const float* q = &qkv[token * 3 * width + head * c.head_dim];
    std::vector<double> scores, out(c.head_dim);
    double sum = 0;
    for (int k = 0; k < c.tokens; ++k) {
        const float* key = &qkv[k * 3 * width + width + head * c.head_dim];
        double score = 0;
        for (int d = 0; d < c.head_dim; ++d) score += double(q[d]) * key[d];
        scores.push_back(std::exp(score / std::sqrt(double(c.head_dim))));
        sum += scores.back();
    }
    for (int k = 0; k < c.tokens; ++k)
        for (int d = 0; d < c.head_dim; ++d)
            out[d] += scores[k] / sum * qkv[k * 3 * width + 2 * width + head * c.head_dim + d];
    return out;
}

bool check_attention(const Heads& c, const char* isa, const LpvitThreads* threads,
                     std::mt19937& random) {
    std::normal_distribution<float> normal;
    const std::size_t width = std::size_t(c.heads) * c.head_dim;
    std::vector<float> qkv(c.tokens * 3 * width), out(c.tokens * width, NAN);
    // Numbers are bfloat16 already for a kernel that rounds them, whose softmax is rounded as well.
    const bool is_rounded = numbers_of(isa) == kBfloat16;
    for (float& value : qkv) value = is_rounded ? rounded(normal(random)) : normal(random);
    const double tolerance = is_rounded ? 0.01 : 5e-6;
    const void* kernel = lpvit_attention_kernel(isa, c.head_dim);
    if (kernel == nullptr) return false;
    if (lpvit_attention(kernel, threads, qkv.data(), c.tokens, c.heads, c.head_dim,
                        1.0f / std::sqrt(float(c.head_dim)), out.data()) != 0)
        return false;
    for (int token = 0; token < c.tokens; ++token)
        for (int head = 0; head < c.heads; ++head) {
            const std::vector<double> right = expected_attention(c, qkv, token, head);
            for (int d = 0; d < c.head_dim; ++d) {
                const double got = out[token * width + head * c.head_dim + d];
                if (!(std::fabs(got - right[d]) <= tolerance)) {
                    std::printf("%s attention of %d tokens, %d heads of %d: %g, not %g\n", isa,
                                c.tokens, c.heads, c.head_dim, got, right[d]);
                    return false;
                }
            }
        }
    return true;
}

}  // namespace

int main() {
    const LpvitThreads threads = {three, backwards};
    for (const char* isa : {"avx512_bf16", "avx512_vnni", "avx512", "avx2_int8", "avx2", "neon_dotprod",
                            "neon_int8", "neon", "portable_int8", "portable"}) {
        if (!lpvit_supports(isa)) continue;
        std::mt19937 random(1);
        for (const Case& c : kCases)
            if (!check(c, isa, nullptr, random) || !check(c, isa, &threads, random)) return 1;
        std::size_t cases = 2 * sizeof(kCases) / sizeof(Case);
        if (numbers_of(isa) != kInt8) {  // which has no attention of its own
            for (const Heads& c : kHeads)
                if (!check_attention(c, isa, nullptr, random) ||
                    !check_attention(c, isa, &threads, random))
                    return 1;
            cases += 2 * sizeof(kHeads) / sizeof(Heads);
        }
        if (lpvit_fma_loop(isa, 10) <= 0) return 1;
        std::printf("%s equals float64 in %zu cases\n", isa, cases);
    }
    return 0;
}
