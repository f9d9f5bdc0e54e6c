// The head by fewer bytes: the screen never changes the choice, and its bound holds.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>

#include "errors.h"
#include "head.h"
#include "made_tensor.h"
#include "model.h"

namespace nearfar::tests {
namespace {

using Floats = std::vector<float>;
constexpr int64_t kWidth = 256, kVocab = 400;

MadeTensor of_floats(const Floats& x, int64_t rows, int64_t cols) {
  MadeTensor t{TensorType::kF32, rows, cols, std::vector<uint8_t>(x.size() * 4)};
  std::memcpy(t.bytes.data(), x.data(), t.bytes.size());
  return t;
}

// As Q8_0 with a scale of 1/8: the numbers are multiples of it.
MadeTensor of_eighths(const Floats& x, int64_t rows, int64_t cols) {
  MadeTensor t{TensorType::kQ8_0, rows, cols, {}};
  for (size_t i = 0; i < x.size(); ++i) {
    if (i % 32 == 0) {
      t.bytes.resize(t.bytes.size() + 2);
      put_f16(&t.bytes[t.bytes.size() - 2], 0.125f);
    }
    t.bytes.push_back(static_cast<uint8_t>(static_cast<int8_t>(x[i] * 8)));
  }
  return t;
}

Floats random(size_t n, uint32_t seed, float scale = 1.0f) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0, scale);
  Floats x(n);
  for (float& v : x) v = normal(rng);
  return x;
}

// A model whose one layer is never run: what matters is its head.
struct HeadModel {
  MadeTensor zeros, wide, head;
  Floats gain;
  Tensors tensors;
  ModelSpec spec;

  explicit HeadModel(MadeTensor t) : head(std::move(t)) {
    const int64_t d = head.cols;
    zeros = of_floats(Floats(d * d), d, d);
    wide = of_floats(Floats(head.rows * d), head.rows, d);
    gain.assign(d, 1.0f);
    spec = {.n_layers = 1,
            .d_model = d,
            .n_heads = 1,
            .n_kv_heads = 1,
            .head_dim = d,
            .d_ff = d,
            .n_vocab = head.rows,
            .norm_eps = 1e-5f,
            .rope_base = 10000.0,
            .rope_scale = 1.0,
            .rope_pairs = RopePairs::kHalves,
            .activation = Activation::kSilu,
            .has_sub_norms = false,
            .has_qk_norms = false};
    for (const char* name :
         {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}) {
      tensors.matrices[std::string("blk.0.") + name + ".weight"] = zeros.raw();
    }
    tensors.matrices["token_embd.weight"] = wide.raw();
    tensors.matrices["output.weight"] = head.raw();
    for (const char* name : {"blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "final"}) {
      tensors.vectors[name] = gain;
    }
  }

  std::unique_ptr<Model> open(HeadMode mode, std::string_view isa = "", int threads = 2) const {
    return std::make_unique<Model>(
        spec, tensors,
        ModelOptions{
            .first = 0, .last = 1, .n_threads = threads, .kernels = kernels(isa), .head = mode});
  }
};

struct Choice {
  std::vector<int32_t> ids, n_panels;
  Floats sure;
};

Choice greedy(Model& model, const Floats& h) {
  const auto d = model.spec().d_model, rows = static_cast<int64_t>(h.size()) / d;
  Choice c{std::vector<int32_t>(rows), std::vector<int32_t>(rows), Floats(rows)};
  model.greedy({h.data(), rows, d}, "final", {c.ids.data(), c.sure.data(), c.n_panels.data()});
  return c;
}

std::vector<int32_t> argmax_of_logits(Model& model, const Floats& h) {
  const auto d = model.spec().d_model, rows = static_cast<int64_t>(h.size()) / d;
  const auto v = model.spec().n_vocab;
  Floats z(rows * v);
  model.logits({h.data(), rows, d}, "final", z.data());
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < rows; ++i) {
    const auto first = z.begin() + i * v;
    ids.push_back(static_cast<int32_t>(std::max_element(first, first + v) - first));
  }
  return ids;
}

// Rows that point to some row of the head, more or less: their largest logit stands out.
Floats confident_rows(const MadeTensor& head, int64_t rows, uint32_t seed, float noise) {
  Floats h = random(rows * head.cols, seed, noise);
  for (int64_t i = 0; i < rows; ++i) {
    Floats w(head.cols);
    dequantize_row(head.raw(), (seed + 37 * i) % head.rows, w);
    double norm = 0;
    for (const float x : w) norm += static_cast<double>(x) * x;
    for (int64_t k = 0; k < head.cols && norm > 0; ++k) {
      h[i * head.cols + k] += w[k] * static_cast<float>(std::sqrt(head.cols / norm));
    }
  }
  return h;
}

void check_same(const MadeTensor& head, const Floats& h) {
  const HeadModel made(head);
  for (const std::string_view isa : isas_available()) {
    const auto model = made.open(HeadMode::kScreened, isa);
    const Choice found = greedy(*model, h);
    CHECK(found.ids == argmax_of_logits(*model, h));
    const auto alone = made.open(HeadMode::kScreened, isa, 1);
    CHECK(greedy(*alone, h).ids == found.ids);
    CHECK(greedy(*alone, h).sure == found.sure);
  }
}

}  // namespace

TEST_CASE("a screened choice is the first of the largest logits, for every type of head") {
  for (const TensorType type : kTypes) {
    MadeTensor head = make_tensor(type, kVocab, kWidth, 7);
    CAPTURE(head.name());
    for (const float noise : {0.0f, 0.3f, 3.0f}) {
      check_same(head, confident_rows(head, 4, 5, noise));
    }
  }
}

TEST_CASE("clear choices read few panels, and only heads of more than six bits are screened") {
  for (const TensorType type : kTypes) {
    const MadeTensor head = make_tensor(type, kVocab, kWidth, 7);
    CAPTURE(head.name());
    const auto model = HeadModel(head).open(HeadMode::kScreened);
    const bool heavy = type == TensorType::kF32 || type == TensorType::kF16 ||
                       type == TensorType::kBF16 || type == TensorType::kQ8_0 ||
                       type == TensorType::kQ6_K;
    CHECK(model->is_screened() == heavy);
  }
  const MadeTensor head = of_floats(random(kVocab * kWidth, 3), kVocab, kWidth);
  const auto model = HeadModel(head).open(HeadMode::kScreened);
  for (const int32_t n : greedy(*model, confident_rows(head, 20, 2, 0.1f)).n_panels) CHECK(n == 1);
}

TEST_CASE("ties, zeros, huge and tiny rows do not lead the screen astray") {
  const Floats h = random(7 * kWidth, 1);
  const auto head = [](const std::function<float(int64_t, int64_t, float)>& f) {
    Floats w = random(kVocab * kWidth, 9);
    for (int64_t i = 0; i < kVocab * kWidth; ++i) w[i] = f(i / kWidth, i % kWidth, w[i]);
    return of_floats(w, kVocab, kWidth);
  };
  const Floats one = random(kWidth, 4);
  SUBCASE("all rows equal") {
    check_same(head([&](auto, auto k, auto) { return one[k]; }), h);
  }
  SUBCASE("zeros") {
    check_same(head([](auto, auto, auto) { return 0.0f; }), h);
  }
  SUBCASE("pairs of equal rows") {
    check_same(head([&](auto v, auto k, auto) { return one[k] * static_cast<float>(v / 2 % 9); }),
               h);
  }
  SUBCASE("rows that differ in a last bit") {
    check_same(head([&](auto v, auto k, auto) {
                 return k == v % kWidth ? std::nextafter(one[k], 9.0f) : one[k];
               }),
               h);
  }
  SUBCASE("one row a million times as long, one a millionth") {
    check_same(
        head([](auto v, auto, auto x) { return v == 300 ? x * 1e6f
                                               : v == 3 ? x * 1e-6f
                                                        : x; }), h);
  }
  SUBCASE("beyond the 16-bit scales of the copy") {
    check_same(head([](auto, auto, auto x) { return x * 1e7f; }), h);
  }
  SUBCASE("below the smallest float") {
    check_same(head([](auto, auto, auto x) { return x * 1e-42f; }), h);
  }
  SUBCASE("input of zeros") {
    check_same(head([](auto, auto, auto x) { return x; }), Floats(3 * kWidth, 0.0f));
  }
}

TEST_CASE("one to nine rows and odd sizes of head") {
  for (const int64_t rows : {1, 3, 17, 63, 64, 65, 1023}) {
    const MadeTensor head = make_tensor(TensorType::kQ8_0, rows, 64, 11);
    check_same(head, confident_rows(head, rows % 9 + 1, 3, 0.5f));
  }
}

TEST_CASE("the difference between a product and its copy's stays inside the bound") {
  ThreadPool pool(1);
  for (const TensorType type : {TensorType::kF32, TensorType::kF16, TensorType::kBF16,
                                TensorType::kQ8_0, TensorType::kQ6_K}) {
    const MadeTensor head = make_tensor(type, 200, 512, 21);
    CAPTURE(head.name());
    const PackedMat w = pack(head.raw());
    ScreenBounds bounds;
    const PackedMat copy = screen_copy(head.raw(), pack(head.raw()), pool, bounds);
    QuantRows x, c;
    const Floats h = confident_rows(head, 4, 8, 0.5f);
    quantize_rows(h, 4, 512, w.grain(), x);
    quantize_rows(h, 4, 512, copy.grain(), c);
    Floats z(4 * 200), s(4 * 200);
    matmul(kernels(), w, x, z);
    matmul(kernels(), copy, c, s);
    for (int64_t i = 0; i < 4; ++i) {
      const InputNorms n = input_norms(x.view(), c.view(), i);
      CHECK((n.difference == 0) == (w.grain() == copy.grain()));
      double closest = 0;
      for (int64_t v = 0; v < 200; ++v) {
        const double e = bounds.residual[v] * n.head + bounds.size[v] * n.difference;
        const double slack = 1e-4 * (bounds.size[v] * n.copy + bounds.residual[v] * n.head);
        const double off = std::fabs(static_cast<double>(s[i * 200 + v]) - z[i * 200 + v]);
        CHECK(off <= e + slack);
        closest = std::max(closest, off / e);
      }
      CHECK(closest > 0.02);  // else the bound says little
    }
  }
}

TEST_CASE("the bound is met where the residual points along the input") {
  // Weights 3/8 of a step below their codes everywhere, input all ones: no cancellation.
  Floats w(64 * 32, 0.0f);
  for (int64_t v = 0; v < 64; ++v) {
    for (int64_t k = 0; k < 32; ++k) w[v * 32 + k] = k == 0 ? -8.0f : 2.625f;
  }
  ThreadPool pool(1);
  ScreenBounds bounds;
  const MadeTensor head = of_eighths(w, 64, 32);
  const PackedMat copy = screen_copy(head.raw(), pack(head.raw()), pool, bounds);
  Floats row(32);
  unpack_row(copy, 0, row);
  double along = 0;
  for (int64_t k = 0; k < 32; ++k) along += row[k] - w[k];
  CHECK(along == doctest::Approx(0.375 * 31));
  CHECK(bounds.residual[0] * std::sqrt(32.0) >= along);
  CHECK(bounds.residual[0] * std::sqrt(32.0) <= along * 1.02);
}

TEST_CASE("a copy that misleads as far as it can changes nothing") {
  // Row 10 loses, but its copy is 12 above it; row 100 wins, its copy is 11 below. Both by nearly
  // all that the bound allows.
  Floats w(200 * 32, 0.0f);
  for (int64_t k = 0; k < 32; ++k) {
    w[10 * 32 + k] = k == 0 ? -8.0f : 2.625f;
    w[100 * 32 + k] = k == 0 ? -8.0f : k < 3 ? 7.0f : 2.375f;
  }
  const MadeTensor head = of_eighths(w, 200, 32);
  const Floats ones(32, 1.0f);
  check_same(head, ones);
  const auto model = HeadModel(head).open(HeadMode::kScreened);
  CHECK(greedy(*model, ones).ids == std::vector<int32_t>{100});
  CHECK(greedy(*model, ones).n_panels == std::vector<int32_t>{2});
}

TEST_CASE("a head of 4.5 bits is the tensor rounded to Q4_0, and a screen of it is none") {
  const MadeTensor head = make_tensor(TensorType::kQ8_0, 130, 256, 5);
  const auto model = HeadModel(head).open(HeadMode::kQ4);
  CHECK(model->panels().back().kind == "q4");
  CHECK_FALSE(model->is_screened());
  const Floats h = random(3 * 256, 2);
  CHECK(greedy(*model, h).ids == argmax_of_logits(*model, h));
  CHECK(greedy(*model, h).n_panels == std::vector<int32_t>(3, 0));
}

TEST_CASE("what is not a number is refused") {
  Floats w = random(100 * 64, 5);
  const HeadModel fine(of_floats(w, 100, 64));
  Floats h = random(64, 1);
  h[5] = std::numeric_limits<float>::quiet_NaN();
  for (const HeadMode mode : {HeadMode::kFile, HeadMode::kScreened}) {
    const auto model = fine.open(mode);
    CHECK_THROWS_AS(greedy(*model, h), EngineFailure);
  }
  w[3] = std::numeric_limits<float>::infinity();
  CHECK_THROWS_WITH_AS(HeadModel(of_floats(w, 100, 64)).open(HeadMode::kScreened),
                       doctest::Contains("not finite"), std::invalid_argument);
  w[3] = 1e7f;
  CHECK_THROWS_WITH_AS(HeadModel(of_floats(w, 100, 64)).open(HeadMode::kQ4),
                       doctest::Contains("too large"), std::invalid_argument);
  CHECK_THROWS_WITH_AS(head_mode("q5"), doctest::Contains("expected file, q4 or screened"),
                       std::invalid_argument);
}

}  // namespace nearfar::tests
