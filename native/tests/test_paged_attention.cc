// Paged attention against softmax(q k^T / sqrt(d)) v in double, and against itself in other
// batches.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "half.h"
#include "kernels.h"
#include "paged_attention.h"

namespace nearfar::tests {
namespace {

using Floats = std::vector<float>;

// Weights of up to 200 positions add up in f32; values are of order 1.
constexpr double kMaxPagedError = 3e-6;
// Tiles round queries and the weights of values to bf16, 2^-9 of each.
constexpr double kMaxTileError = 8e-3;
// Codes times scales are rounded to bf16: keys and values by 2^-9 of each.
constexpr double kMaxCodeError = 3e-2;

// Sequences of some lengths over one store, their blocks at random places.
struct Store {
  int64_t n_kv_heads, group, head_dim;
  PagedType type;
  std::vector<int64_t> lengths;
  std::vector<std::vector<int32_t>> blocks;
  std::vector<Floats> q, k, v;  // by sequence, [length, heads, head_dim]
  std::vector<uint8_t> keys, values;
  int64_t n_blocks = 0;

  Store(int64_t n_kv_heads, int64_t group, int64_t head_dim, PagedType type,
        std::vector<int64_t> lengths)
      : n_kv_heads(n_kv_heads), group(group), head_dim(head_dim), type(type), lengths(lengths) {
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    const auto draw = [&](int64_t n) {
      Floats x(n);
      for (float& value : x) value = round(normal(rng));
      return x;
    };
    for (const int64_t length : lengths) n_blocks += (length + kBlock - 1) / kBlock;
    n_blocks += 2;  // that nobody uses
    std::vector<int32_t> places(n_blocks);
    std::iota(places.begin(), places.end(), 0);
    std::shuffle(places.begin(), places.end(), rng);
    for (const int64_t length : lengths) {
      const int64_t n = (length + kBlock - 1) / kBlock;
      blocks.emplace_back(places.end() - n, places.end());
      places.resize(places.size() - n);
      q.push_back(draw(length * n_kv_heads * group * head_dim));
      for (std::vector<Floats>* rows : {&k, &v}) {
        rows->push_back(draw(length * n_kv_heads * head_dim));
        if (type == PagedType::kInt8) to_codes(rows->back());
      }
    }
    // What nobody has written is not a number: it must not reach anybody.
    keys.assign(n_blocks * n_kv_heads * kv().head_size() * kv().number_bytes(), 0xff);
    values = keys;
  }

  // Heads as whole numbers times a scale: what int8 holds to the last bit.
  void to_codes(Floats& x) const {
    for (size_t i = 0; i < x.size(); i += head_dim) {
      float most = 0;
      for (int64_t d = 0; d < head_dim; ++d) most = std::max(most, std::fabs(x[i + d]));
      const float scale = most / 127;
      for (int64_t d = 0; d < head_dim; ++d) x[i + d] = std::round(x[i + d] / scale) * scale;
    }
  }
  // As the store will hold it.
  float round(float x) const {
    if (type == PagedType::kBF16) return bf16_to_f32(f32_to_bf16(x));
    return type == PagedType::kF32 ? x : f16_to_f32(f32_to_f16(x));
  }
  double max_error(const Ops& ops) const {
    if (type == PagedType::kInt8) return kMaxCodeError;
    return type == PagedType::kBF16 && ops.attend_pairs != nullptr ? kMaxTileError : kMaxPagedError;
  }
  PagedKv kv() { return {type, n_blocks, n_kv_heads, head_dim, keys.data(), values.data()}; }

  // Attention of rows [start, start + n) of each sequence in one call, their keys put in before.
  struct Piece {
    int64_t seq, start, n;
  };
  std::vector<Floats> run(const std::vector<Piece>& pieces, const Kernels& kernels, int threads) {
    ThreadPool pool(threads);
    const int64_t n_heads = n_kv_heads * group, wide = n_heads * head_dim,
                  narrow = n_kv_heads * head_dim;
    std::vector<PagedScratch> scratch(threads, PagedScratch(n_heads, n_kv_heads, head_dim));
    Floats rows_q, rows_k, rows_v;
    std::vector<PagedSpan> spans;
    int64_t row = 0;
    for (const auto& [seq, start, n] : pieces) {
      spans.push_back({row, n, start, blocks[seq].data()});
      rows_q.insert(rows_q.end(), q[seq].begin() + start * wide,
                    q[seq].begin() + (start + n) * wide);
      rows_k.insert(rows_k.end(), k[seq].begin() + start * narrow,
                    k[seq].begin() + (start + n) * narrow);
      rows_v.insert(rows_v.end(), v[seq].begin() + start * narrow,
                    v[seq].begin() + (start + n) * narrow);
      row += n;
    }
    Floats out(rows_q.size());
    paged_append(kv(), spans, rows_k.data(), rows_v.data(), *kernels.ops, pool);
    paged_attention(kv(), spans, n_heads, rows_q.data(), out.data(), *kernels.ops, pool, scratch);
    std::vector<Floats> found;
    for (const PagedSpan& span : spans) {
      found.emplace_back(out.begin() + span.row * wide, out.begin() + (span.row + span.n) * wide);
    }
    return found;
  }

  double wanted(int64_t seq, int64_t row, int64_t head, int64_t d) const {
    const int64_t n_heads = n_kv_heads * group;
    std::vector<double> score(row + 1);
    for (int64_t j = 0; j <= row; ++j) {
      for (int64_t i = 0; i < head_dim; ++i) {
        score[j] += static_cast<double>(q[seq][(row * n_heads + head) * head_dim + i]) *
                    k[seq][(j * n_kv_heads + head / group) * head_dim + i];
      }
      score[j] /= std::sqrt(static_cast<double>(head_dim));
    }
    const double top = *std::max_element(score.begin(), score.end());
    double sum = 0, out = 0;
    for (int64_t j = 0; j <= row; ++j) {
      const double p = std::exp(score[j] - top);
      sum += p;
      out += p * v[seq][(j * n_kv_heads + head / group) * head_dim + d];
    }
    return out / sum;
  }
};

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

TEST_CASE("paged attention is softmax(q k^T / sqrt(d)) v, in every ISA") {
  for (const auto isa : isas_available()) {
    for (const PagedType type :
         {PagedType::kF32, PagedType::kF16, PagedType::kBF16, PagedType::kInt8}) {
      Store s(2, 3, 32, type, {1, 64, 65, 150});
      const auto found = s.run({{0, 0, 1}, {1, 0, 64}, {2, 0, 65}, {3, 0, 150}}, kernels(isa), 1);
      double worst = 0;
      for (size_t seq = 0; seq < found.size(); ++seq) {
        for (int64_t row = 0; row < s.lengths[seq]; row += 13) {
          for (int64_t i = 0; i < 6 * 32; ++i) {
            const double error = found[seq][row * 6 * 32 + i] - s.wanted(seq, row, i / 32, i % 32);
            worst = std::max(worst, std::abs(error));
          }
        }
      }
      CAPTURE(isa);
      CHECK(worst < s.max_error(*kernels(isa).ops));
    }
  }
}

TEST_CASE("a row has the same bits in any batch, any chunk, any thread count") {
  for (const PagedType type :
       {PagedType::kF32, PagedType::kF16, PagedType::kBF16, PagedType::kInt8}) {
    for (const auto isa : isas_available()) {
      for (const int64_t head_dim : {32, 64, 96}) {
        Store s(2, 2, head_dim, type, {130, 200, 7});
        const Kernels& k = kernels(isa);
        const auto whole = s.run({{0, 0, 130}, {1, 0, 200}, {2, 0, 7}}, k, 1);
        CHECK(same_bits(s.run({{1, 0, 200}}, k, 2)[0], whole[1]));
        const int64_t wide = 4 * head_dim;
        for (const int64_t cut : {1, 17, 63, 64, 65, 129}) {
          const Floats first = s.run({{2, 0, 7}, {0, 0, cut}}, k, 2)[1];
          const Floats rest = s.run({{0, cut, 130 - cut}, {1, 199, 1}}, k, 1)[0];
          CHECK(same_bits(first, Floats(whole[0].begin(), whole[0].begin() + cut * wide)));
          CHECK(same_bits(rest, Floats(whole[0].begin() + cut * wide, whole[0].end())));
        }
        CHECK(same_bits(s.run({{1, 199, 1}}, k, 2)[0],
                        Floats(whole[1].end() - wide, whole[1].end())));
      }
    }
  }
}

TEST_CASE("a key or value that is not finite harms who sees it and nobody else") {
  for (const auto isa : isas_available()) {
    for (const PagedType type : {PagedType::kBF16, PagedType::kInt8}) {
      for (const float bad : {std::nanf(""), INFINITY, 3.4e38f}) {
        for (std::vector<Floats> Store::* which : {&Store::k, &Store::v}) {
          Store s(1, 1, 32, type, {70});
          const Floats before = s.run({{0, 0, 70}}, kernels(isa), 1)[0];
          const auto rows = [](const Floats& x, int64_t first, int64_t last) {
            return Floats(x.begin() + first * 32, x.begin() + last * 32);
          };
          Floats& numbers = (s.*which)[0];
          const Floats good = numbers;
          numbers[40 * 32 + 3] = numbers[41 * 32 + 3] = bad;
          const Floats harmed = s.run({{0, 0, 70}}, kernels(isa), 1)[0];
          CHECK(same_bits(rows(harmed, 0, 40), rows(before, 0, 40)));
          CHECK(std::isnan(harmed[40 * 32]));
          CHECK(std::isnan(harmed[69 * 32]));
          // As after two drafts that were wrong: position 40 anew, 41 still as it was.
          numbers = good;
          CHECK(same_bits(s.run({{0, 40, 1}}, kernels(isa), 1)[0], rows(before, 40, 41)));
        }
      }
    }
  }
}

}  // namespace nearfar::tests
