// Rotary position embedding (2104.09864, eq. 34): which angle, and which two numbers turn together.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace nearfar {

enum class RopePairs : uint8_t { kAdjacent, kHalves };  // (2i, 2i+1) or (i, i + head_dim/2)

// base^(-2i / head_dim) / factors[i], [head_dim / 2].  `factors` is empty or as long.
std::vector<double> rope_frequencies(double base, int64_t head_dim, std::span<const float> factors);

// cos and sin [n, n_pairs] of positions start..start+n-1, each position multiplied by `scale`.
// Angles in double: near position 10^6 an f32 angle is off by up to 0.05.
void rope_angles(std::span<const double> frequencies, double scale, int64_t start, int64_t n,
                 float* cos, float* sin);

// Turns x [n_heads, 2 * n_pairs] in place by one position's cos and sin [n_pairs].
void rotate(float* x, int64_t n_heads, int64_t n_pairs, const float* cos, const float* sin,
            RopePairs pairs);

}  // namespace nearfar
