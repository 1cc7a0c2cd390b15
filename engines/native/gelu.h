// The exact GELU over one register of floats, for kernels that are compiled with flags of their own:
// inside an anonymous namespace, so that the linker never shares a copy between them.
#pragma once

#include "min_max.h"

namespace lpvit {
namespace {

// x * Phi(x) = max(x, 0) - |x| * Phi(-|x|), exact (erf) GELU. Phi(-t) on 0 <= t <= 5.5 is a
// polynomial in s = 2 t / 5.5 - 1, fitted here by weighted least squares to minimise the largest
// t * error (5.8e-7); in float32 the result stays within 1e-6 of float64 (tests hold 2e-6).
template <class Vector>
inline Vector gelu(Vector x) {
    constexpr float p[] = {2.9799584299e-03f,  -2.5008747354e-02f, 9.4535000622e-02f,
                           -2.0676803589e-01f, 2.7234369516e-01f,  -1.7778705060e-01f,
                           -5.4695479572e-02f, 2.2245469689e-01f,  -1.5184360743e-01f,
                           -4.7723557800e-02f, 1.1391010880e-01f,  -2.7933988720e-02f,
                           -2.7246810496e-02f, 1.2783746235e-02f};
    constexpr float limit = 5.5f;
    const Vector zero = {};
    const Vector positive = larger(x, zero);
    const Vector magnitude = larger(x, -x);  // a NaN stays one
    const Vector t = smaller(zero + limit, magnitude);
    const Vector s = t * (2.0f / limit) - 1.0f;
    Vector q = zero + p[13];
    for (int i = 12; i >= 0; --i) q = q * s + p[i];
    return positive - t * q;
}

}  // namespace
}  // namespace lpvit
