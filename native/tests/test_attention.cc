// The attention routine against softmax(q k^T / sqrt(d)) v in double, and against itself in other
// cuts.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "attention.h"
#include "half.h"
#include "kernels.h"

namespace nearfar::tests {
namespace {

using Floats = std::vector<float>;

// Weights of up to 200 positions add up in f32; values are of order 1.
constexpr double kMaxAttentionError = 3e-6;

struct Case {
  int64_t n_kv_heads, group, head_dim, length;
  KvType type;
  KvPolicy policy = {};

  int64_t n_heads() const { return n_kv_heads * group; }
};

constexpr Case kCases[] = {
    {2, 1, 64, 1, KvType::kF16},
    {2, 2, 64, 63, KvType::kF16},
    {1, 3, 16, 64, KvType::kF32},
    {2, 4, 20, 65, KvType::kF16},
    {3, 5, 80, 130, KvType::kF32},
    {1, 1, 2, 200, KvType::kF16},
    {1, 70, 8, 66, KvType::kF16},
    {2, 2, 128, 193, KvType::kF32},
    {2, 2, 64, 130, KvType::kInt8},
    {1, 4, 80, 65, KvType::kInt8},
    {2, 7, 20, 200, KvType::kInt8},
    {2, 7, 64, 130, KvType::kF16},
    {1, 8, 48, 129, KvType::kF16},
    {1, 9, 32, 66, KvType::kInt8},
    {2, 2, 64, 200, KvType::kF16, {5, 30}},
    {1, 3, 20, 200, KvType::kInt8, {70, 65}},
    {2, 4, 16, 190, KvType::kF32, {0, 64}},
    {1, 40, 16, 150, KvType::kF16, {3, 1}},
};

struct Made {
  Case c;
  Floats q, k, v;         // [length, heads, head_dim]
  Floats far_q, plain_k;  // what rows outside the window meet the sinks with: unlike q and k

  explicit Made(const Case& c, uint32_t seed = 1) : c(c) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    q.resize(c.length * c.n_heads() * c.head_dim);
    k.resize(c.length * c.n_kv_heads * c.head_dim);
    v.resize(k.size());
    far_q.resize(q.size());
    plain_k.resize(k.size());
    for (Floats* x : {&q, &k, &v, &far_q, &plain_k}) {
      for (float& value : *x) value = normal(rng);
    }
  }

  // Rows in calls of at most `rows_a_call`, keys and values appended just before.
  Floats run(int64_t rows_a_call, int n_threads, std::string_view isa = "") const {
    const Ops& ops = *kernels(isa).ops;
    ThreadPool pool(n_threads);
    std::vector<AttentionScratch> scratch;
    for (int i = 0; i < n_threads; ++i) scratch.emplace_back(c.n_heads(), c.n_kv_heads, c.head_dim);
    KvCache kv({.first = 0,
                .last = 1,
                .n_kv_heads = c.n_kv_heads,
                .head_dim = c.head_dim,
                .max_len = c.length,
                .type = c.type,
                .policy = c.policy});
    Floats out(q.size());
    const int64_t d_q = c.n_heads() * c.head_dim, d_kv = c.n_kv_heads * c.head_dim;
    for (int64_t start = 0; start < c.length; start += rows_a_call) {
      const int64_t rows = std::min(rows_a_call, c.length - start);
      kv.append(
          0,
          {k.data() + start * d_kv, plain_k.data() + start * d_kv, v.data() + start * d_kv, rows},
          ops);
      attention({kv, 0, start, rows, c.n_heads(), q.data() + start * d_q, out.data() + start * d_q,
                 far_q.data() + start * d_q},
                ops, pool, scratch);
    }
    return out;
  }
};

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// x [n] of one head as the cache gives it back.
Floats stored(const float* x, int64_t n, KvType type) {
  Floats y(x, x + n);
  if (type == KvType::kF16) {
    for (float& value : y) value = f16_to_f32(f32_to_f16(value));
  }
  for (int64_t d = 0; type == KvType::kInt8 && d < n; d += kInt8Group) {
    const auto begin = y.begin() + d, end = y.begin() + std::min(n, d + kInt8Group);
    float largest = 0;
    for (auto i = begin; i < end; ++i) largest = std::max(largest, std::abs(*i));
    const float step = f16_to_f32(f32_to_f16(largest / 127.0f));
    for (auto i = begin; i < end; ++i)
      *i = std::clamp(std::nearbyint(*i / step), -127.0f, 127.0f) * step;
  }
  return y;
}

double naive(const Made& m, int64_t row, int64_t head, int64_t d) {
  const Case& c = m.c;
  const int64_t hd = c.head_dim;
  std::vector<double> scores(row + 1, -1e300);
  double max = -1e300, sum = 0, out = 0;
  const auto place = [&](int64_t j) { return (j * c.n_kv_heads + head / c.group) * hd; };
  for (int64_t j = 0; j <= row; ++j) {
    const bool far = c.policy.has_window() && row - j >= c.policy.window;
    if (far && j >= c.policy.sink) continue;
    const Floats key = stored((far ? m.plain_k : m.k).data() + place(j), hd, c.type);
    const float* query = (far ? m.far_q : m.q).data() + (row * c.n_heads() + head) * hd;
    scores[j] = 0;
    for (int64_t i = 0; i < hd; ++i) scores[j] += double{query[i]} * key[i];
    scores[j] /= std::sqrt(static_cast<double>(hd));
    max = std::max(max, scores[j]);
  }
  for (int64_t j = 0; j <= row; ++j) {
    const double p = std::exp(scores[j] - max);
    sum += p;
    out += p * stored(m.v.data() + place(j), hd, c.type)[d];
  }
  return out / sum;
}

TEST_CASE("attention is the softmax over the positions that a row sees") {
  for (const Case& c : kCases) {
    const Made m(c);
    const Floats out = m.run(c.length, 1);
    double worst = 0;
    for (int64_t row = 0; row < c.length; row += row < 3 ? 1 : 29) {
      for (int64_t head = 0; head < c.n_heads(); head += 1 + c.n_heads() / 5) {
        for (const int64_t d : {int64_t{0}, c.head_dim - 1}) {
          const double y = out[(row * c.n_heads() + head) * c.head_dim + d];
          worst = std::max(worst, std::abs(y - naive(m, row, head, d)));
        }
      }
    }
    CHECK(worst < kMaxAttentionError);
  }
}

TEST_CASE("a row has the same bits in any call, on any thread, with any isa") {
  for (const Case& c : kCases) {
    const Made m(c);
    const Floats whole = m.run(c.length, 1, "ref");
    CHECK(same_bits(m.run(1, 1), whole));
    CHECK(same_bits(m.run(7, 3), whole));
    for (const auto isa : isas_available()) CHECK(same_bits(m.run(c.length, 2, isa), whole));
  }
}

TEST_CASE("a row does not feel what comes after it, whatever that is") {
  const Case c{1, 4, 64, 70, KvType::kF32};
  Made m(c);
  const Floats before = m.run(c.length, 1);
  const int64_t last = (c.length - 1) * c.head_dim;
  std::fill(m.k.begin() + last, m.k.end(), std::numeric_limits<float>::quiet_NaN());
  std::fill(m.v.begin() + last, m.v.end(), std::numeric_limits<float>::infinity());
  const Floats after = m.run(c.length, 1);
  const size_t n_before_last = (c.length - 1) * c.n_heads() * c.head_dim;
  CHECK(std::memcmp(before.data(), after.data(), n_before_last * sizeof(float)) == 0);
  CHECK(std::isnan(after.back()));
}

TEST_CASE("scores far apart neither overflow nor vanish") {
  const Case c{1, 1, 16, 130, KvType::kF32};
  Made m(c);
  for (float& x : m.q) x *= 300.0f;
  const Floats out = m.run(c.length, 1);
  for (int64_t row = 0; row < c.length; row += 43) {
    CHECK(out[row * 16] == doctest::Approx(naive(m, row, 0, 0)).epsilon(1e-3));
  }
}

}  // namespace
}  // namespace nearfar::tests
