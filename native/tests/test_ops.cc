// Norms, activations, f16 and rotation against their equations in double; every ISA against `ref`.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "half.h"
#include "kernels.h"
#include "rope.h"

namespace nearfar::tests {
namespace {

using Floats = std::vector<float>;
constexpr int64_t kLengths[] = {1, 3, 15, 16, 17, 64, 1023};
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Some ulps: a sum over up to 1023 numbers in 16 lanes, a division, a square root.
constexpr double kMaxNormError = 1e-6;
// The polynomial of exp (3e-7), a division and two products.
constexpr double kMaxSiluError = 1e-6;

Floats draw(int64_t n, uint32_t seed, float std = 1.0f) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0f, std);
  Floats x(n);
  for (float& v : x) v = normal(rng);
  return x;
}

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

TEST_CASE("rms_norm is x / sqrt(mean(x^2) + eps) * gain") {
  const Ops& ops = *kernels("ref").ops;
  for (const int64_t n : kLengths) {
    const Floats x = draw(n, 1, 3.0f), gain = draw(n, 2);
    Floats y(n);
    ops.rms_norm(x.data(), gain.data(), n, 1e-5f, y.data());
    double squares = 0;
    for (const float v : x) squares += double{v} * v;
    const double scale = 1 / std::sqrt(squares / n + 1e-5);
    for (int64_t i = 0; i < n; ++i) {
      CHECK(y[i] == doctest::Approx(x[i] * scale * gain[i]).epsilon(kMaxNormError));
    }
    Floats in_place = x;
    ops.rms_norm(in_place.data(), gain.data(), n, 1e-5f, in_place.data());
    CHECK(same_bits(in_place, y));
  }
}

TEST_CASE("silu and squared relu, far out and in the middle") {
  const Ops& ops = *kernels("ref").ops;
  Floats gate = draw(1000, 3, 8.0f);
  for (const float x : {0.0f, -0.0f, 87.5f, -87.5f, 200.0f, -200.0f, 3e38f, -3e38f, 1e-40f}) {
    gate.push_back(x);
  }
  const auto n = static_cast<int64_t>(gate.size());
  const Floats up = draw(n, 4);
  Floats y(n);
  ops.silu_mul(gate.data(), up.data(), n, y.data());
  for (int64_t i = 0; i < n; ++i) {
    const double expected = gate[i] / (1 + std::exp(-double{gate[i]})) * up[i];
    // Below -87 the true factor is under 1e-36; a result below 1e-38 is denormal and rounds
    // coarsely.
    const double slack =
        kMaxSiluError * std::abs(expected) + 1e-35 * std::abs(up[i] * gate[i]) + 1e-44;
    CHECK(std::abs(y[i] - expected) <= slack);
  }
  ops.relu2_mul(gate.data(), up.data(), 1000, y.data());
  for (int64_t i = 0; i < 1000; ++i) {
    const float positive = std::max(gate[i], 0.0f);
    CHECK(y[i] == positive * positive * up[i]);
  }
}

TEST_CASE("a number that is not one stays so") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const auto isa : isas_available()) {
    const Ops& ops = *kernels(isa).ops;
    const Floats gate = {1.0f, nan, 2.0f}, up = {1.0f, 1.0f, nan};
    Floats y(3);
    ops.silu_mul(gate.data(), up.data(), 3, y.data());
    CHECK(std::isfinite(y[0]));
    CHECK(std::isnan(y[1]));
    CHECK(std::isnan(y[2]));
  }
}

TEST_CASE("every isa gives the bits of ref") {
  const Ops& ref = *kernels("ref").ops;
  for (const auto isa : isas_available()) {
    const Ops& ops = *kernels(isa).ops;
    for (const int64_t n : kLengths) {
      const Floats a = draw(n, 5, 4.0f), b = draw(n, 6);
      Floats y(n), expected(n);
      ops.rms_norm(a.data(), b.data(), n, 1e-5f, y.data());
      ref.rms_norm(a.data(), b.data(), n, 1e-5f, expected.data());
      CHECK(same_bits(y, expected));
      ops.silu_mul(a.data(), b.data(), n, y.data());
      ref.silu_mul(a.data(), b.data(), n, expected.data());
      CHECK(same_bits(y, expected));
      ops.relu2_mul(a.data(), b.data(), n, y.data());
      ref.relu2_mul(a.data(), b.data(), n, expected.data());
      CHECK(same_bits(y, expected));
      ops.add(a.data(), n, y.data());
      ref.add(a.data(), n, expected.data());
      CHECK(same_bits(y, expected));
    }
  }
}

TEST_CASE("f16 there and back, all of them and what lies between") {
  for (const auto isa : isas_available()) {
    const Ops& ops = *kernels(isa).ops;
    std::vector<uint16_t> half(1 << 16), back(half.size());
    for (size_t i = 0; i < half.size(); ++i) half[i] = static_cast<uint16_t>(i);
    Floats wide(half.size());
    ops.from_half(half.data(), half.size(), wide.data());
    ops.to_half(wide.data(), wide.size(), back.data());
    int64_t wrong = 0;
    for (size_t i = 0; i < half.size(); ++i) {
      const bool is_nan = (i & 0x7fff) > 0x7c00;
      wrong += is_nan ? !std::isnan(wide[i]) : wide[i] != f16_to_f32(half[i]) || back[i] != half[i];
    }
    CHECK(wrong == 0);

    Floats x = draw(5000, 7, 1e-4f);  // ties, denormals, overflow
    for (const float v : {65519.0f, 65520.0f, 7e4f, 0x1.002p0f, 0x1.006p0f, 0x1p-25f, 0x1.8p-24f}) {
      x.push_back(v);
      x.push_back(-v);
    }
    std::vector<uint16_t> rounded(x.size());
    ops.to_half(x.data(), x.size(), rounded.data());
    for (size_t i = 0; i < x.size(); ++i) CHECK(rounded[i] == f32_to_f16(x[i]));
  }
}

TEST_CASE("from_int8 is code times scale, for every code") {
  constexpr int64_t kHeadDim = 48;  // a group of 32 and one of 16
  constexpr int64_t kGroups = int8_groups(kHeadDim);
  std::vector<int8_t> k(kHeadDim * kBlock), v(k.size());  // no byte behind the last
  for (size_t i = 0; i < k.size(); ++i) {
    k[i] = static_cast<int8_t>(i % 256 - 128);
    v[i] = static_cast<int8_t>(127 - i % 256);
  }
  const Floats k_scales = draw(kGroups * kBlock, 9), v_scales = draw(kGroups * kBlock, 10);
  for (const auto isa : isas_available()) {
    Floats wide_k(k.size()), wide_v(v.size());
    AttendBlock<int8_t> block{};
    block.head_dim = kHeadDim;
    block.k = k.data();
    block.v = v.data();
    block.k_scales = k_scales.data();
    block.v_scales = v_scales.data();
    kernels(isa).ops->from_int8(block, wide_k.data(), wide_v.data());
    int64_t wrong = 0;
    for (int64_t d = 0; d < kHeadDim; ++d) {
      for (int64_t j = 0; j < kBlock; ++j) {
        const int64_t group = d / kInt8Group, in_k = d * kBlock + j, in_v = j * kHeadDim + d;
        wrong += wide_k[in_k] != k[in_k] * k_scales[group * kBlock + j];
        wrong += wide_v[in_v] != v[in_v] * v_scales[j * kGroups + group];
      }
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("rotation turns pairs by position times frequency") {
  constexpr int64_t kHeads = 3, kPairs = 4, kPosition = 1'000'003;
  const Floats factors = {1.0f, 2.0f, 4.0f, 8.0f};
  const auto frequencies = rope_frequencies(10000.0, 2 * kPairs, factors);
  Floats cos(kPairs), sin(kPairs);
  rope_angles(frequencies, 0.25, kPosition, 1, cos.data(), sin.data());
  for (const auto pairs : {RopePairs::kAdjacent, RopePairs::kHalves}) {
    const Floats x = draw(kHeads * 2 * kPairs, 8);
    Floats y = x;
    rotate(y.data(), kHeads, kPairs, cos.data(), sin.data(), pairs);
    for (int64_t head = 0; head < kHeads; ++head) {
      for (int64_t i = 0; i < kPairs; ++i) {
        const bool adjacent = pairs == RopePairs::kAdjacent;
        const int64_t a = head * 2 * kPairs + (adjacent ? 2 * i : i);
        const int64_t b = a + (adjacent ? 1 : kPairs);
        const double angle = kPosition * 0.25 * std::pow(10000.0, -i / 4.0) / factors[i];
        CHECK(std::abs(y[a] - (x[a] * std::cos(angle) - x[b] * std::sin(angle))) < 1e-6);
        CHECK(std::abs(y[b] - (x[a] * std::sin(angle) + x[b] * std::cos(angle))) < 1e-6);
      }
    }
  }
}

}  // namespace
}  // namespace nearfar::tests
