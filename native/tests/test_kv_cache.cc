#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "errors.h"
#include "half.h"
#include "kernels.h"
#include "kv_cache.h"

namespace nearfar::tests {
namespace {

using Floats = std::vector<float>;
constexpr int64_t kHeads = 2, kHeadDim = 20;  // padded to 32
constexpr int64_t kWidth = kHeads * kHeadDim;

KvShape shape(KvType type, int64_t max_len = 1000) {
  return {.first = 1,
          .last = 4,
          .n_kv_heads = kHeads,
          .head_dim = kHeadDim,
          .max_len = max_len,
          .type = type};
}

const Ops& ops() { return *kernels().ops; }

Floats draw(int64_t rows, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  Floats x(rows * kWidth);
  for (float& v : x) v = normal(rng);
  return x;
}

// Keys and values of `rows` positions go to one layer; what the cache ought to hold is kept beside.
struct Filled {
  KvCache& kv;
  int layer;
  Floats k, v;

  void append(int64_t rows, uint32_t seed) {
    const Floats new_k = draw(rows, seed), new_v = draw(rows, seed + 1000);
    kv.append(layer, {new_k.data(), new_k.data(), new_v.data(), rows}, ops());
    k.insert(k.end(), new_k.begin(), new_k.end());
    v.insert(v.end(), new_v.begin(), new_v.end());
  }
};

float rounded(float x, KvType type) { return type == KvType::kF16 ? f16_to_f32(f32_to_f16(x)) : x; }

// Number `i` of a block, which holds K and V of one head.
float at(const KvCache& kv, const void* block, int64_t i) {
  return kv.shape().type == KvType::kF16 ? f16_to_f32(static_cast<const uint16_t*>(block)[i])
                                         : static_cast<const float*>(block)[i];
}

// Compares positions [0, n) of a layer with k and v, and the padding with zero.
int64_t n_wrong(const KvCache& kv, int layer, int64_t n, const Floats& k, const Floats& v) {
  const int64_t padded = kv.padded_head_dim();
  int64_t wrong = kv.length(layer) != n;
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t head = 0; head < kHeads; ++head) {
      const void* block = kv.block(layer, j / kBlock, head);
      for (int64_t d = 0; d < padded; ++d) {
        const int64_t from = j * kWidth + head * kHeadDim + d;
        const bool inside = d < kHeadDim;
        wrong += at(kv, block, d * kBlock + j % kBlock) !=
                 (inside ? rounded(k[from], kv.shape().type) : 0);
        wrong += at(kv, block, (kBlock + j % kBlock) * padded + d) !=
                 (inside ? rounded(v[from], kv.shape().type) : 0);
      }
    }
  }
  return wrong;
}

TEST_CASE("what is appended is read back, rounded to the cache's type") {
  for (const auto type : {KvType::kF16, KvType::kF32}) {
    KvCache kv(shape(type));
    Filled layer{kv, 2, {}, {}};
    for (const int64_t rows : {1, 3, 59, 1, 64, 130, 1}) layer.append(rows, 7 * rows);
    CHECK(n_wrong(kv, 2, 259, layer.k, layer.v) == 0);
    CHECK(kv.length(1) == 0);
    CHECK(kv.n_bytes() == 5 * 2 * kHeads * 32 * kBlock * (type == KvType::kF16 ? 2 : 4));
  }
}

TEST_CASE("truncation drops positions of every layer that has them") {
  KvCache kv(shape(KvType::kF32));
  Filled low{kv, 1, {}, {}}, high{kv, 3, {}, {}};
  low.append(150, 1);
  high.append(70, 2);
  kv.truncate(100);
  CHECK(n_wrong(kv, 1, 100, low.k, low.v) == 0);
  CHECK(n_wrong(kv, 3, 70, high.k, high.v) == 0);
  kv.truncate(64);
  const size_t two_blocks = kv.n_bytes();
  CHECK(n_wrong(kv, 3, 64, high.k, high.v) == 0);
  low.k.resize(64 * kWidth), low.v.resize(64 * kWidth);
  low.append(2, 3);
  CHECK(n_wrong(kv, 1, 66, low.k, low.v) == 0);
  CHECK(kv.n_bytes() == two_blocks / 2 * 3);
  kv.truncate(0);
  CHECK(kv.n_bytes() == 0);
}

TEST_CASE("a fork and its origin live on alone, and either can go first") {
  for (const bool origin_goes : {true, false}) {
    auto origin = std::make_unique<KvCache>(shape(KvType::kF16));
    Filled a{*origin, 1, {}, {}};
    a.append(150, 1);
    auto fork = origin->fork(140);
    Filled b{*fork, 1, a.k, a.v};
    b.k.resize(140 * kWidth), b.v.resize(140 * kWidth);
    CHECK(n_wrong(*fork, 1, 140, b.k, b.v) == 0);

    a.append(60, 2);
    b.append(90, 3);
    CHECK(n_wrong(*origin, 1, 210, a.k, a.v) == 0);
    CHECK(n_wrong(*fork, 1, 230, b.k, b.v) == 0);
    if (origin_goes) {
      origin.reset();
      CHECK(n_wrong(*fork, 1, 230, b.k, b.v) == 0);
    } else {
      fork.reset();
      CHECK(n_wrong(*origin, 1, 210, a.k, a.v) == 0);
    }
  }
}

TEST_CASE("a shared block is copied before it is written to again") {
  KvCache kv(shape(KvType::kF16));
  Filled a{kv, 1, {}, {}};
  a.append(128, 1);  // two full blocks, both shared with the fork
  const auto fork = kv.fork(128);
  const Floats k = a.k, v = a.v;
  kv.truncate(100);
  a.k.resize(100 * kWidth), a.v.resize(100 * kWidth);
  a.append(28, 2);
  CHECK(n_wrong(kv, 1, 128, a.k, a.v) == 0);
  CHECK(n_wrong(*fork, 1, 128, k, v) == 0);
}

KvShape windowed(int64_t sink, int64_t window, KvType type = KvType::kF32) {
  KvShape s = shape(type, kMaxWindow);
  s.policy = {.sink = sink, .window = window};
  return s;
}

void run(KvCache& kv, int layer, int64_t rows, uint32_t seed, bool keeps = true) {
  const Floats x = draw(rows, seed);
  for (int64_t i = 0; i < rows; i += 128) {
    const float* at = x.data() + i * kWidth;
    kv.append(layer, {at, at, at, std::min<int64_t>(128, rows - i)}, ops());
  }
  if (keeps) kv.keep(layer);
}

TEST_CASE("behind a window memory stays constant, and sinks stay") {
  KvCache kv(windowed(70, 130, KvType::kInt8));
  size_t bytes = 0;
  for (int i = 0; i < 100; ++i) {
    run(kv, 1, 64, i);
    if (i == 10) bytes = kv.n_bytes();
  }
  CHECK(kv.length(1) == 6400);
  CHECK(kv.n_bytes() == bytes);
  // Window and slack need four blocks here, the sinks two, of 8.5 bits a number.
  CHECK(bytes <= 6 * 2 * kHeads * kBlock * (32 + 2));
  CHECK(static_cast<const int8_t*>(kv.sinks(1, 0, 0))[0] != 0);
}

TEST_CASE("a cut keeps the window before it whole, or is refused") {
  KvCache kv(windowed(4, 100));
  run(kv, 1, 1000, 1);
  run(kv, 2, 990, 1);
  CHECK_THROWS_AS(kv.truncate(400), KvTruncated);
  CHECK_THROWS_AS(kv.fork(400), KvTruncated);
  CHECK(kv.length(1) == 1000);
  CHECK_NOTHROW(kv.truncate(1000 - kSlack));
  CHECK(kv.length(2) == 1000 - kSlack);
  CHECK_NOTHROW(kv.truncate(0));
  run(kv, 1, 5, 2);
  CHECK(kv.length(1) == 5);
}

TEST_CASE("a call that is taken back leaves the same bytes, however long it was") {
  for (const int64_t before : {0, 3, 64, 100, 300, 1000}) {
    for (const int64_t more : {1, 200, 2000}) {
      KvCache kv(windowed(4, 100));
      run(kv, 1, before, 1);
      const size_t bytes = kv.n_bytes();
      const auto copy = kv.fork(before);
      run(kv, 1, more, 2, false);
      kv.take_back(1);
      CHECK(kv.length(1) == before);
      CHECK(kv.n_bytes() == bytes);
      for (int64_t j = std::max<int64_t>(0, before - 100 - kSlack); j < before; ++j) {
        const auto value = [&](const KvCache& cache) {
          return at(cache, cache.block(1, j / kBlock, 1), j % kBlock);
        };
        CHECK(value(kv) == value(*copy));
      }
    }
  }
}

TEST_CASE("sizes, layers and lengths that make no sense are refused") {
  CHECK_THROWS_AS(KvCache(shape(KvType::kF16, 0)), std::invalid_argument);
  KvCache kv(shape(KvType::kF16));
  CHECK_THROWS_AS(kv.length(0), std::invalid_argument);
  CHECK_THROWS_AS(kv.length(4), std::invalid_argument);
  CHECK_THROWS_AS(kv.truncate(-1), std::invalid_argument);
  CHECK_THROWS_AS(kv.fork(-1), std::invalid_argument);
}

TEST_CASE("a cache that is in use is neither cut nor forked") {
  KvCache kv(shape(KvType::kF16));
  kv.in_use().test_and_set();
  CHECK_THROWS_AS(kv.truncate(0), EngineBusy);
  CHECK_THROWS_AS(kv.fork(0), EngineBusy);
  CHECK(kv.length(1) == 0);
  kv.in_use().clear();
  CHECK_NOTHROW(kv.truncate(0));
}

}  // namespace
}  // namespace nearfar::tests
