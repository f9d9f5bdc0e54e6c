// The layer loop on small random models: a row's bits, the cache after failures, refusals.
// That the numbers are those of the specification is tested from Python, against lower_numpy.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <thread>

#include "errors.h"
#include "made_tensor.h"
#include "model.h"

namespace {

std::atomic<int> g_allocations_left{-1};  // aligned ones; -1: no limit

}  // namespace

// KV blocks come from here; everything else in a call is allocated at open.
void* operator new(std::size_t n, std::align_val_t alignment) {
  if (g_allocations_left.load() == 0) throw std::bad_alloc();
  if (g_allocations_left.load() > 0) g_allocations_left.fetch_sub(1);
  const auto a = static_cast<std::size_t>(alignment);
  if (void* p = std::aligned_alloc(a, (n + a - 1) / a * a)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace nearfar::tests {
namespace {

using Floats = std::vector<float>;
constexpr int kLayers = 3;
constexpr int64_t kWidth = 256, kVocab = 70;

struct Variant {
  const char* name;
  TensorType weights;
  RopePairs pairs;
  Activation activation;
  bool sub_norms, qk_norms, bias;
};

constexpr Variant kVariants[] = {
    {"llama", TensorType::kQ4_0, RopePairs::kAdjacent, Activation::kSilu, false, false, false},
    {"qwen2", TensorType::kQ8_0, RopePairs::kHalves, Activation::kSilu, false, false, true},
    {"qwen3", TensorType::kQ6_K, RopePairs::kHalves, Activation::kSilu, false, true, false},
    {"bitnet", TensorType::kTQ2_0, RopePairs::kHalves, Activation::kSilu, true, false, false},
    {"bitnet-b1.58", TensorType::kTQ1_0, RopePairs::kHalves, Activation::kRelu2, true, false,
     false},
    {"floats", TensorType::kF32, RopePairs::kHalves, Activation::kSilu, false, false, false},
};

// The tensors of a random model, and what is made of them.
struct Tiny {
  ModelSpec spec;
  std::map<std::string, MadeTensor> made;
  std::map<std::string, Floats> vectors;

  explicit Tiny(const Variant& v, uint32_t seed = 1) {
    spec = {.n_layers = kLayers,
            .d_model = kWidth,
            .n_heads = 4,
            .n_kv_heads = 2,
            .head_dim = 64,
            .d_ff = 512,
            .n_vocab = kVocab,
            .norm_eps = 1e-5f,
            .rope_base = 10000.0,
            .rope_scale = 1.0,
            .rope_pairs = v.pairs,
            .activation = v.activation,
            .has_sub_norms = v.sub_norms,
            .has_qk_norms = v.qk_norms};
    const auto matrix = [&](const std::string& name, int64_t rows, int64_t cols, TensorType type) {
      made.emplace(name + ".weight", make_tensor(type, rows, cols, ++seed));
    };
    std::mt19937 rng(seed);
    const auto vector = [&](const std::string& name, int64_t n) {
      std::uniform_real_distribution<float> uniform(0.5f, 1.5f);
      for (int64_t i = 0; i < n; ++i) vectors[name].push_back(uniform(rng));
    };
    matrix("token_embd", kVocab, kWidth, TensorType::kQ8_0);
    vector("final", kWidth);
    vector("exit.1", kWidth);
    for (int i = 0; i < kLayers; ++i) {
      const std::string block = "blk." + std::to_string(i) + ".";
      for (const char* name : {"attn_norm.weight", "ffn_norm.weight"}) vector(block + name, kWidth);
      vector(block + "attn_sub_norm.weight", 256);
      vector(block + "ffn_sub_norm.weight", 512);
      vector(block + "attn_q_norm.weight", 64);
      vector(block + "attn_k_norm.weight", 64);
      if (v.bias) {
        vector(block + "attn_q.bias", 256);
        vector(block + "attn_v.bias", 128);
      }
      matrix(block + "attn_q", 256, kWidth, v.weights);
      matrix(block + "attn_k", 128, kWidth, v.weights);
      matrix(block + "attn_v", 128, kWidth, TensorType::kF16);  // another grain beside it
      matrix(block + "attn_output", kWidth, 256, v.weights);
      matrix(block + "ffn_gate", 512, kWidth, v.weights);
      matrix(block + "ffn_up", 512, kWidth, v.weights);
      matrix(block + "ffn_down", kWidth, 512, v.weights);
      vectors[block + "ffn_down.scale"] = {0.5f};
    }
  }

  Tensors tensors() const {
    Tensors t;
    for (const auto& [name, tensor] : made) t.matrices[name] = tensor.raw();
    for (const auto& [name, values] : vectors) t.vectors[name] = values;
    return t;
  }

  std::unique_ptr<Model> open(int n_threads = 1, std::string_view isa = "", int first = 0,
                              int last = kLayers, bool lut = false) const {
    return std::make_unique<Model>(spec, tensors(),
                                   ModelOptions{first, last, n_threads, kernels(isa), lut});
  }
};

Floats embed(const Model& model, int64_t n) {
  std::vector<int32_t> ids(n);
  for (int64_t i = 0; i < n; ++i) ids[i] = static_cast<int32_t>(i * 31 % kVocab);
  Floats h(n * kWidth);
  model.embed(ids, h.data());
  return h;
}

Floats forward(Model& model, const Floats& h, KvCache& kv, int first, int last,
               const uint8_t* cancel = nullptr) {
  Floats out(h.size());
  model.forward({h.data(), static_cast<int64_t>(h.size()) / kWidth, kWidth}, kv, first, last,
                cancel, out.data());
  return out;
}

// All layers over `h`, in calls of at most `rows_a_call`.
Floats run(Model& model, const Floats& h, int64_t rows_a_call, KvType type = KvType::kF16) {
  const auto kv = model.new_kv(1000, type);
  Floats out;
  for (size_t at = 0; at < h.size(); at += rows_a_call * kWidth) {
    const size_t end = std::min(h.size(), at + rows_a_call * kWidth);
    const Floats part = forward(model, Floats(h.begin() + at, h.begin() + end), *kv, 0, kLayers);
    out.insert(out.end(), part.begin(), part.end());
  }
  return out;
}

Floats logits(Model& model, const Floats& h, const std::string& head) {
  const int64_t rows = static_cast<int64_t>(h.size()) / kWidth;
  Floats out(rows * kVocab);
  model.logits({h.data(), rows, kWidth}, head, out.data());
  return out;
}

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<int64_t> lengths(const KvCache& kv) {
  std::vector<int64_t> all;
  for (int i = kv.shape().first; i < kv.shape().last; ++i) all.push_back(kv.length(i));
  return all;
}

TEST_CASE("a row has the same bits alone and in company, with any number of threads and any isa") {
  for (const Variant& variant : kVariants) {
    CAPTURE(variant.name);
    const Tiny tiny(variant);
    const auto model = tiny.open();
    const Floats h = embed(*model, 9);
    const Floats whole = run(*model, h, 9);
    CHECK(std::isfinite(whole.back()));
    CHECK(same_bits(run(*model, h, 1), whole));
    CHECK(same_bits(run(*model, h, 4), whole));
    CHECK(same_bits(run(*tiny.open(3), h, 9), whole));
    CHECK(same_bits(run(*tiny.open(2), h, 1), whole));
    for (const auto isa : isas_available()) CHECK(same_bits(run(*tiny.open(1, isa), h, 5), whole));
    CHECK(!same_bits(run(*model, h, 9, KvType::kF32), whole));
  }
}

TEST_CASE("logits of a row do not depend on the rows beside it") {
  for (const Variant& variant : kVariants) {
    const Tiny tiny(variant);
    const auto model = tiny.open(2);
    const Floats h = embed(*model, 5);
    for (const char* head : {"final", "exit.1"}) {
      const Floats whole = logits(*model, h, head);
      for (int64_t i = 0; i < 5; ++i) {
        const Floats row =
            logits(*model, Floats(h.begin() + i * kWidth, h.begin() + (i + 1) * kWidth), head);
        CHECK(std::memcmp(row.data(), whole.data() + i * kVocab, kVocab * sizeof(float)) == 0);
      }
    }
    CHECK(!same_bits(logits(*model, h, "final"), logits(*model, h, "exit.1")));
  }
}

TEST_CASE("chunks of 256 rows leave no seam") {
  const Tiny tiny(kVariants[3]);
  const auto model = tiny.open();
  const Floats h = embed(*model, 300);
  CHECK(same_bits(run(*tiny.open(2), h, 300), run(*model, h, 67)));
}

// Blocks of every layer, and sequences that take them from the end.
struct Blocks {
  PagedType type;
  int64_t n_blocks;
  std::vector<std::vector<float>> memory;  // f32, or f16 in the first halves
  std::vector<PagedKv> kv;
  std::vector<std::vector<int32_t>> lists;

  Blocks(PagedType type, int64_t n_blocks) : type(type), n_blocks(n_blocks) {
    for (int i = 0; i < 2 * kLayers; ++i) memory.emplace_back(n_blocks * 2 * 64 * kBlock);
    for (int i = 0; i < kLayers; ++i) {
      kv.push_back({type, n_blocks, 2, 64, memory[2 * i].data(), memory[2 * i + 1].data()});
    }
    for (const int first : {0, 1, 2}) {
      lists.emplace_back();
      for (auto b = static_cast<int32_t>(n_blocks - 1 - first); b >= 0; b -= 3) {
        lists.back().push_back(b);
      }
    }
  }
};

TEST_CASE("rows of many sequences over blocks have the bits of each one alone") {
  struct Piece {
    int64_t seq, start, n;
  };
  // Three sequences of 270, 70 and 3 positions in three calls; the last one is wider than a chunk.
  const std::vector<std::vector<Piece>> calls = {{{0, 0, 10}, {1, 0, 1}},
                                                 {{1, 1, 5}, {2, 0, 2}, {0, 10, 1}},
                                                 {{0, 11, 259}, {2, 2, 1}, {1, 6, 64}}};
  for (const Variant& variant : kVariants) {
    CAPTURE(variant.name);
    const Tiny tiny(variant);
    for (const int threads : {1, 2}) {
      const auto model = tiny.open(threads);
      for (const PagedType type : {PagedType::kF16, PagedType::kF32}) {
        Blocks blocks(type, 15);
        std::vector<Floats> found(3);
        const Floats all = embed(*model, 270);
        for (const auto& pieces : calls) {
          Floats h;
          std::vector<PagedSpan> spans;
          for (const auto& [seq, start, n] : pieces) {
            spans.push_back(
                {static_cast<int64_t>(h.size()) / kWidth, n, start, blocks.lists[seq].data()});
            for (int64_t i = start; i < start + n; ++i) {
              const auto row = all.begin() + (i * (seq + 1) % 270) * kWidth;
              h.insert(h.end(), row, row + kWidth);
            }
          }
          Floats out(h.size());
          model->forward({h.data(), static_cast<int64_t>(h.size()) / kWidth, kWidth}, spans,
                         std::span<const PagedKv>(blocks.kv).first(2), 0, 2, out.data());
          model->forward({out.data(), static_cast<int64_t>(h.size()) / kWidth, kWidth}, spans,
                         std::span<const PagedKv>(blocks.kv).last(1), 2, 3, out.data());
          for (size_t i = 0; i < pieces.size(); ++i) {
            const auto begin = out.begin() + spans[i].row * kWidth;
            found[pieces[i].seq].insert(found[pieces[i].seq].end(), begin,
                                        begin + spans[i].n * kWidth);
          }
        }
        for (int64_t seq = 0; seq < 3; ++seq) {
          Floats h;
          for (int64_t i = 0; i < static_cast<int64_t>(found[seq].size()) / kWidth; ++i) {
            const auto row = all.begin() + (i * (seq + 1) % 270) * kWidth;
            h.insert(h.end(), row, row + kWidth);
          }
          CHECK(
              same_bits(run(*model, h, 1000, type == PagedType::kF16 ? KvType::kF16 : KvType::kF32),
                        found[seq]));
        }
      }
    }
  }
}

TEST_CASE("spans and blocks that do not fit are refused") {
  const Tiny tiny(kVariants[2]);
  const auto model = tiny.open();
  Blocks blocks(PagedType::kF16, 12);
  const Floats h = embed(*model, 4);
  Floats out(h.size());
  const auto call = [&](std::vector<PagedSpan> spans, size_t layers, int first, int last) {
    for (PagedSpan& s : spans) s.blocks = blocks.lists[0].data();
    model->forward({h.data(), 4, kWidth}, spans, std::span<const PagedKv>(blocks.kv).first(layers),
                   first, last, out.data());
  };
  CHECK_NOTHROW(call({{0, 4, 0, nullptr}}, 3, 0, 3));
  CHECK_THROWS_WITH_AS(call({{0, 3, 0, nullptr}}, 3, 0, 3), doctest::Contains("3 rows: expected 4"),
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(call({{1, 3, 0, nullptr}}, 3, 0, 3), doctest::Contains("behind the other"),
                       std::invalid_argument);
  CHECK_THROWS_WITH_AS(call({{0, 4, 0, nullptr}}, 2, 0, 3), doctest::Contains("stores of 2"),
                       std::invalid_argument);
  CHECK_THROWS_AS(call({{0, 4, 0, nullptr}}, 0, 1, 1), std::invalid_argument);
  blocks.kv[0].head_dim = 32;
  CHECK_THROWS_WITH_AS(call({{0, 4, 0, nullptr}}, 3, 0, 3), doctest::Contains("another shape"),
                       std::invalid_argument);
}

TEST_CASE("by lookup too a row's bits depend on nothing but the rows before it") {
  const Tiny tiny(
      {"biased", TensorType::kTQ1_0, RopePairs::kHalves, Activation::kSilu, true, false, true});
  const auto open = [&](int n_threads, std::string_view isa) {
    return tiny.open(n_threads, isa, 0, kLayers, true);
  };
  const auto model = open(1, "ref");
  const auto panels = model->panels();
  CHECK(std::count_if(panels.begin(), panels.end(),
                      [](const PanelInfo& p) { return p.kind == "l3"; }) == 6 * kLayers);
  const Floats h = embed(*model, 150);  // two chunks, and rows by 32
  const Floats whole = run(*model, h, 150);
  CHECK(same_bits(run(*model, h, 1), whole));
  for (const auto isa : isas_available()) {
    if (kernels(isa).lut_tables == nullptr) continue;
    CHECK(same_bits(run(*open(1, isa), h, 150), whole));
    CHECK(same_bits(run(*open(2, isa), h, 150), whole));
    CHECK(same_bits(run(*open(2, isa), h, 47), whole));
    CHECK(same_bits(run(*open(1, isa), h, 3), whole));
  }
  CHECK(!same_bits(run(*tiny.open(), h, 150), whole));
}

TEST_CASE("kernels without lookups refuse them") {
  const Tiny tiny(kVariants[4]);
  Kernels poorer = kernels();
  poorer.lut_tables = nullptr;
  CHECK_THROWS_WITH_AS(Model(tiny.spec, tiny.tensors(), ModelOptions{0, kLayers, 1, poorer, true}),
                       doctest::Contains("lut \"off\""), std::invalid_argument);
}

TEST_CASE("a split at any layer gives the same bits, also in two models") {
  for (const Variant& variant : kVariants) {
    const Tiny tiny(variant);
    const auto model = tiny.open();
    const Floats h = embed(*model, 6), whole = run(*model, h, 6);
    for (int cut = 1; cut < kLayers; ++cut) {
      const auto kv = model->new_kv(10, KvType::kF16);
      CHECK(same_bits(forward(*model, forward(*model, h, *kv, 0, cut), *kv, cut, kLayers), whole));
      const auto low = tiny.open(1, "", 0, cut), high = tiny.open(1, "", cut, kLayers);
      const auto low_kv = low->new_kv(10, KvType::kF16), high_kv = high->new_kv(10, KvType::kF16);
      const Floats middle = forward(*low, h, *low_kv, 0, cut);
      CHECK(same_bits(forward(*high, middle, *high_kv, cut, kLayers), whole));
    }
  }
}

TEST_CASE("layers above may lag behind and catch up in one pass") {
  const Tiny tiny(kVariants[0]);
  const auto model = tiny.open();
  const Floats h = embed(*model, 6), whole = run(*model, h, 6);
  const auto kv = model->new_kv(10, KvType::kF16);
  Floats owed;
  for (int64_t i = 0; i < 6; ++i) {
    const Floats row(h.begin() + i * kWidth, h.begin() + (i + 1) * kWidth);
    const Floats low = forward(*model, row, *kv, 0, 2);
    owed.insert(owed.end(), low.begin(), low.end());
  }
  CHECK(lengths(*kv) == std::vector<int64_t>{6, 6, 0});
  CHECK_THROWS_AS(forward(*model, owed, *kv, 0, 3), std::invalid_argument);
  CHECK(same_bits(forward(*model, owed, *kv, 2, 3), whole));
}

TEST_CASE("truncate and run again, fork and run on: the same bits") {
  const Tiny tiny(kVariants[1]);
  const auto model = tiny.open();
  const Floats h = embed(*model, 80);
  const Floats head(h.begin(), h.begin() + 70 * kWidth), tail(h.begin() + 70 * kWidth, h.end());
  auto kv = model->new_kv(100, KvType::kF16);
  forward(*model, head, *kv, 0, kLayers);
  const Floats expected = forward(*model, tail, *kv, 0, kLayers);
  kv->truncate(70);
  auto fork = kv->fork(70);
  CHECK(same_bits(forward(*model, tail, *kv, 0, kLayers), expected));
  kv.reset();
  CHECK(same_bits(forward(*model, tail, *fork, 0, kLayers), expected));
}

TEST_CASE("a cancelled call leaves the cache as it was") {
  const Tiny tiny(kVariants[3]);
  const auto model = tiny.open(2);
  const auto kv = model->new_kv(1000, KvType::kF16);
  const Floats h = embed(*model, 300);
  forward(*model, embed(*model, 3), *kv, 0, kLayers);
  const uint8_t set = 1;
  CHECK_THROWS_AS(forward(*model, h, *kv, 0, kLayers, &set), Cancelled);
  CHECK(lengths(*kv) == std::vector<int64_t>{3, 3, 3});

  for (int delay_us = 0; delay_us < 4000; delay_us += 500) {  // somewhere on the way
    uint8_t flag = 0;
    std::thread other([&] {
      std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
      __atomic_store_n(&flag, uint8_t{1}, __ATOMIC_RELAXED);
    });
    bool cancelled = false;
    try {
      forward(*model, h, *kv, 0, kLayers, &flag);
    } catch (const Cancelled&) {
      cancelled = true;
    }
    other.join();
    const int64_t expected = cancelled ? 3 : 303;
    CHECK(lengths(*kv) == std::vector<int64_t>{expected, expected, expected});
    kv->truncate(3);
  }
}

TEST_CASE("a call that fails on the way leaves the cache as it was") {
  Tiny tiny(kVariants[0]);
  tiny.vectors["blk.2.ffn_norm.weight"][5] = std::numeric_limits<float>::infinity();
  for (const int n_threads : {1, 2}) {
    const auto model = tiny.open(n_threads);
    const auto kv = model->new_kv(100, KvType::kF16);
    const Floats h = embed(*model, 40);
    forward(*model, h, *kv, 0, 2);
    kv->truncate(30);
    CHECK_THROWS_AS(forward(*model, h, *kv, 2, 3), EngineFailure);
    CHECK(lengths(*kv) == std::vector<int64_t>{30, 30, 0});
    CHECK_NOTHROW(forward(*model, h, *kv, 0, 2));
  }
}

TEST_CASE("a call that runs out of memory leaves the cache as it was") {
  const Tiny tiny(kVariants[0]);
  const auto model = tiny.open();
  const auto kv = model->new_kv(1000, KvType::kF16);
  const Floats few = embed(*model, 60), many = embed(*model, 150);
  const Floats expected = run(*model, many, 150);
  forward(*model, few, *kv, 0, kLayers);
  for (int left = 0; left < 9; ++left) {  // 3 more blocks in each of 3 layers
    g_allocations_left = left;
    CHECK_THROWS_AS(forward(*model, many, *kv, 0, kLayers), std::bad_alloc);
    g_allocations_left = -1;
    CHECK(lengths(*kv) == std::vector<int64_t>{60, 60, 60});
    const size_t n_bytes = kv->n_bytes();
    CHECK(n_bytes == kv->fork(60)->n_bytes());
  }
  kv->truncate(0);
  CHECK(same_bits(forward(*model, many, *kv, 0, kLayers), expected));
}

TEST_CASE("the cache's limit holds and costs nothing") {
  const Tiny tiny(kVariants[0]);
  const auto model = tiny.open();
  const auto kv = model->new_kv(5, KvType::kF16);
  forward(*model, embed(*model, 3), *kv, 0, kLayers);
  CHECK_THROWS_AS(forward(*model, embed(*model, 3), *kv, 0, kLayers), ContextFull);
  CHECK(lengths(*kv) == std::vector<int64_t>{3, 3, 3});
  CHECK_NOTHROW(forward(*model, embed(*model, 2), *kv, 0, kLayers));
}

TEST_CASE("what makes no sense is refused by name") {
  const Tiny tiny(kVariants[2]);
  const auto model = tiny.open();
  const auto kv = model->new_kv(10, KvType::kF16);
  const Floats h = embed(*model, 2);
  Floats out(h.size());
  CHECK_THROWS_AS(model->forward({h.data(), 1, 2 * kWidth}, *kv, 0, 1, nullptr, out.data()),
                  std::invalid_argument);
  CHECK_THROWS_AS(model->forward({h.data(), 0, kWidth}, *kv, 0, 1, nullptr, out.data()),
                  std::invalid_argument);
  for (const auto& [first, last] : {std::pair{-1, 1}, {0, 4}, {2, 2}, {2, 1}}) {
    CHECK_THROWS_AS(forward(*model, h, *kv, first, last), std::invalid_argument);
  }
  CHECK_THROWS_AS(model->logits({h.data(), 1, kWidth}, "exit.2", out.data()),
                  std::invalid_argument);
  for (const int32_t id : {-1, 70}) {
    CHECK_THROWS_AS(model->embed(std::vector<int32_t>{id}, out.data()), std::invalid_argument);
  }
  const auto half = tiny.open(1, "", 0, 2);
  CHECK_THROWS_WITH_AS(forward(*half, h, *kv, 0, 2), doctest::Contains("another shape"),
                       std::invalid_argument);

  Tiny broken = tiny;
  broken.made.erase("blk.1.ffn_up.weight");
  CHECK_THROWS_WITH_AS(broken.open(), doctest::Contains("blk.1.ffn_up.weight is missing"),
                       std::invalid_argument);
  broken = tiny;
  broken.vectors["blk.0.attn_norm.weight"].pop_back();
  CHECK_THROWS_WITH_AS(broken.open(), doctest::Contains("blk.0.attn_norm.weight holds 255"),
                       std::invalid_argument);
  broken = tiny;
  broken.made.at("blk.2.attn_k.weight").rows = 64;
  CHECK_THROWS_WITH_AS(broken.open(), doctest::Contains("expected [128, 256]"),
                       std::invalid_argument);
}

TEST_CASE("a cache or a model at work refuses a second thread") {
  const Tiny tiny(kVariants[0]);
  const auto model = tiny.open();
  const auto kv = model->new_kv(1000, KvType::kF16), other = model->new_kv(1000, KvType::kF16);
  const Floats h = embed(*model, 1);
  kv->in_use().test_and_set();
  CHECK_THROWS_AS(forward(*model, h, *kv, 0, kLayers), EngineBusy);
  kv->in_use().clear();

  std::atomic<bool> refused{false};
  std::thread worker([&] {
    while (!refused) {
      try {
        const auto own = model->new_kv(1000, KvType::kF16);
        forward(*model, embed(*model, 100), *own, 0, kLayers);
      } catch (const EngineBusy&) {
        refused = true;
      }
    }
  });
  while (!refused) {
    try {
      forward(*model, h, *other, 0, kLayers);
      other->truncate(0);
    } catch (const EngineBusy&) {
      refused = true;
    }
  }
  worker.join();
  CHECK_NOTHROW(forward(*model, h, *other, 0, kLayers));
}

TEST_CASE("the list of panels names every matrix that a token reads") {
  const Tiny tiny(kVariants[3]);
  const auto all = tiny.open()->panels(), part = tiny.open(1, "", 1, 2)->panels();
  CHECK(all.size() == 7 * kLayers + 1);
  CHECK(part.size() == 8);
  CHECK(part.front().name == "blk.1.attn_q");
  CHECK(part.front().kind == "i2");
  CHECK(part.back().name == "token_embd");
}

}  // namespace
}  // namespace nearfar::tests
