#include "rope.h"

#include <cmath>

namespace nearfar {

std::vector<double> rope_frequencies(double base, int64_t head_dim,
                                     std::span<const float> factors) {
  const int64_t n_pairs = head_dim / 2;
  std::vector<double> frequencies(n_pairs);
  for (int64_t i = 0; i < n_pairs; ++i) {
    frequencies[i] = std::pow(base, -static_cast<double>(i) / static_cast<double>(n_pairs));
    if (!factors.empty()) frequencies[i] /= static_cast<double>(factors[i]);
  }
  return frequencies;
}

void rope_angles(std::span<const double> frequencies, double scale, int64_t start, int64_t n,
                 float* cos, float* sin) {
  for (int64_t row = 0; row < n; ++row) {
    const double position = static_cast<double>(start + row) * scale;
    for (const double frequency : frequencies) {
      *cos++ = static_cast<float>(std::cos(position * frequency));
      *sin++ = static_cast<float>(std::sin(position * frequency));
    }
  }
}

void rotate(float* x, int64_t n_heads, int64_t n_pairs, const float* cos, const float* sin,
            RopePairs pairs) {
  const int64_t step = pairs == RopePairs::kAdjacent ? 2 : 1;
  const int64_t apart = pairs == RopePairs::kAdjacent ? 1 : n_pairs;
  for (int64_t head = 0; head < n_heads; ++head, x += 2 * n_pairs) {
    for (int64_t i = 0; i < n_pairs; ++i) {
      float& a = x[i * step];
      float& b = x[i * step + apart];
      const float turned = a * cos[i] - b * sin[i];
      b = a * sin[i] + b * cos[i];
      a = turned;
    }
  }
}

}  // namespace nearfar
