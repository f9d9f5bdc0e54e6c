#include "paged_attention.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention.h"
#include "check.h"
#include "half.h"

namespace nearfar {
namespace {

constexpr int64_t kMostCodes = 256;  // that wait on the stack

// Rows [first, last) of a span, the queries that share `kv_head`: what a thread does at a time.
struct Tile {
  const PagedSpan* span;
  int64_t kv_head, first, last;

  // Where the numbers of one of its blocks begin.
  int64_t place(const PagedKv& kv, int64_t block) const {
    return (span->blocks[block] * kv.n_kv_heads + kv_head) * kv.head_size();
  }

  // About how long it takes: the longest ones are handed out first.
  int64_t cost() const { return (last - first) * (span->start + last); }
};

template <typename Number>
void attend_block(const AttendBlock<Number>& a, const Ops& ops);
template <>
void attend_block(const AttendBlock<float>& a, const Ops& ops) {
  ops.attend_f32(a);
}
template <>
void attend_block(const AttendBlock<uint16_t>& a, const Ops& ops) {
  ops.attend_f16(a);
}

// The next block lies anywhere: it is asked for while this one is worked on.
void fetch(const PagedKv& kv, int64_t at) {
  const int64_t width = kv.number_bytes(), n_bytes = kv.head_size() * width;
  for (const void* numbers : {kv.k, kv.v}) {
    const auto* p = static_cast<const char*>(numbers) + at * width;
    for (int64_t i = 0; i < n_bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
  }
}

// `next`: what this thread will probably do after it, or null.
void attend_tile(const PagedKv& kv, const Tile& t, const Tile* next, int64_t n_heads,
                 const float* q, float* out, const Ops& ops, PagedScratch& s) {
  const int64_t hd = kv.head_dim, group = n_heads / kv.n_kv_heads;
  const int64_t n_queries = (t.last - t.first) * group;
  NF_DCHECK(n_queries <= static_cast<int64_t>(s.max.size()));
  // Query (row, g) of the call -> row `(row - first) * group + g` of the scratch.
  const auto place = [&](int64_t i) {
    return ((t.span->row + t.first + i / group) * n_heads + t.kv_head * group + i % group) * hd;
  };
  const bool in_pairs = kv.type == PagedType::kBF16 || kv.type == PagedType::kInt8;
  const bool pairs = in_pairs && ops.attend_pairs != nullptr;
  for (int64_t i = 0; i < n_queries; ++i) {
    const float* from = q + place(i);
    if (!pairs) std::copy_n(from, hd, s.q.begin() + i * hd);
    if (pairs) ops.to_bf16(from, hd, s.q16.data() + i * hd);
  }
  std::fill_n(s.out.begin(), n_queries * hd, 0.0f);
  std::fill_n(s.max.begin(), n_queries, -std::numeric_limits<float>::infinity());
  std::fill_n(s.sum.begin(), n_queries, 0.0f);

  const int64_t size = kv.head_size(), end = t.span->start + t.last;
  for (int64_t begin = 0; begin < end; begin += kBlock) {
    for (int64_t i = 0; i < n_queries; ++i) {
      s.visible[2 * i] = 0;
      s.visible[2 * i + 1] =
          std::clamp<int64_t>(t.span->start + t.first + i / group + 1 - begin, 0, kBlock);
    }
    const int64_t at = t.place(kv, begin / kBlock);
    if (begin + kBlock < end) {
      fetch(kv, t.place(kv, begin / kBlock + 1));
    } else if (next != nullptr) {
      fetch(kv, next->place(kv, 0));
    }
    const auto step = [&]<typename Number>(const Number* k, const Number* v) {
      attend_block(AttendBlock<Number>{.n_queries = n_queries,
                                       .head_dim = hd,
                                       .q = s.q.data(),
                                       .k = k,
                                       .v = v,
                                       .k_scales = nullptr,
                                       .v_scales = nullptr,
                                       .visible = s.visible.data(),
                                       .scale = 1.0f / std::sqrt(static_cast<float>(hd)),
                                       .scores = s.scores.data(),
                                       .max = s.max.data(),
                                       .sum = s.sum.data(),
                                       .out = s.out.data()},
                   ops);
    };
    const auto *k16 = static_cast<const uint16_t*>(kv.k) + at,
               *v16 = static_cast<const uint16_t*>(kv.v) + at;
    if (kv.type == PagedType::kInt8) {
      const auto codes = [&](const void* x) { return static_cast<const int8_t*>(x) + at; };
      const auto scales = [&](const void* x) {
        return reinterpret_cast<const float*>(codes(x) + hd * kBlock);
      };
      ops.keys_from_codes(codes(kv.k), scales(kv.k), hd, s.pairs.data());
      ops.values_from_codes(codes(kv.v), scales(kv.v), hd, s.pairs.data() + hd * kBlock);
      k16 = s.pairs.data();
      v16 = k16 + hd * kBlock;
    }
    if (pairs) {
      ops.attend_pairs({.n_queries = n_queries,
                        .head_dim = hd,
                        .q = s.q16.data(),
                        .k = k16,
                        .v = v16,
                        .visible = s.visible.data(),
                        .scale = 1.0f / std::sqrt(static_cast<float>(hd)),
                        .scores = s.scores.data(),
                        .max = s.max.data(),
                        .sum = s.sum.data(),
                        .out = s.out.data()});
    } else if (in_pairs) {
      ops.from_pairs(k16, hd, kBlock, s.block.data());
      ops.from_pairs(v16, kBlock, hd, s.block.data() + hd * kBlock);
      step(static_cast<const float*>(s.block.data()), s.block.data() + hd * kBlock);
    } else if (kv.type == PagedType::kF32) {
      step(static_cast<const float*>(kv.k) + at, static_cast<const float*>(kv.v) + at);
    } else if (n_queries <= kFewQueries) {
      step(static_cast<const uint16_t*>(kv.k) + at, static_cast<const uint16_t*>(kv.v) + at);
    } else {
      ops.from_half(static_cast<const uint16_t*>(kv.k) + at, size, s.block.data());
      ops.from_half(static_cast<const uint16_t*>(kv.v) + at, size, s.block.data() + size);
      step(static_cast<const float*>(s.block.data()), s.block.data() + size);
    }
  }
  for (int64_t i = 0; i < n_queries; ++i) {
    float* o = out + place(i);
    for (int64_t d = 0; d < hd; ++d) o[d] = s.out[i * hd + d] / s.sum[i];
  }
}

// A position whose key or value is not finite gets a key that is not a number and a value of zeros:
// whoever sees it fails, and nobody else, for a value counts zero times where it is not seen.
bool is_finite(const float* k, const float* v, int64_t n, const Ops& ops) {
  constexpr uint32_t kTooLarge = 0x7f7f8000u;  // rounds to infinity in bf16
  return std::max(ops.max_magnitude(k, n), ops.max_magnitude(v, n)) < kTooLarge;
}

// Where number d of a position lies in a block of pairs.
int64_t place_of(bool is_key, int64_t lane, int64_t d, int64_t head_dim) {
  return is_key ? (d / 2 * kBlock + lane) * 2 + d % 2 : (lane / 2 * head_dim + d) * 2 + lane % 2;
}

void put_pairs(const PagedKv& kv, uint16_t* block, const float* x, int64_t lane, bool is_key,
               bool finite) {
  const int64_t hd = kv.head_dim;
  if (lane == 0) std::fill_n(block, kv.head_size(), uint16_t{0});
  const uint16_t instead = is_key ? 0x7fc0 : 0;
  for (int64_t d = 0; d < hd; ++d) {
    block[place_of(is_key, lane, d, hd)] = finite ? f32_to_bf16(x[d]) : instead;
  }
}

// x[head_dim] as codes with a scale.
void put_codes(const PagedKv& kv, int8_t* block, const float* x, int64_t lane, bool is_key,
               bool finite, const Ops& ops) {
  const int64_t hd = kv.head_dim;
  auto* scales = reinterpret_cast<float*>(block + hd * kBlock);
  if (lane == 0) std::memset(block, 0, kv.head_size());
  const float most = finite ? std::bit_cast<float>(ops.max_magnitude(x, hd)) : 0.0f;
  const bool is_zero = most < 0x1p-100f;
  scales[lane] = is_zero ? 0.0f : most / 127.0f;
  if (!finite && is_key) scales[lane] = std::numeric_limits<float>::quiet_NaN();
  int8_t codes[kMostCodes] = {};
  for (int64_t d = 0; d < hd; d += kMostCodes) {
    const int64_t n = std::min(hd - d, kMostCodes);
    if (!is_zero) ops.to_int8(x + d, n, 127.0f / most, codes);
    for (int64_t i = 0; i < n; ++i) block[place_of(is_key, lane, d + i, hd)] = codes[i];
  }
}

}  // namespace

PagedScratch::PagedScratch(int64_t n_heads, int64_t n_kv_heads, int64_t head_dim) {
  const int64_t group = n_heads / n_kv_heads, n_queries = tile_rows(group) * group;
  q.resize(n_queries * head_dim);
  out.resize(n_queries * head_dim);
  scores.resize(n_queries * kBlock);
  max.resize(n_queries);
  sum.resize(n_queries);
  block.resize(2 * head_dim * kBlock);
  visible.resize(2 * n_queries);
  q16.resize(n_queries * head_dim);
  pairs.resize(2 * head_dim * kBlock);
}

void paged_append(const PagedKv& kv, std::span<const PagedSpan> spans, const float* k,
                  const float* v, const Ops& ops, ThreadPool& pool) {
  const int64_t hd = kv.head_dim, size = kv.head_size();
  const auto put = [&](int64_t unit, int) {
    const PagedSpan& span = spans[unit / kv.n_kv_heads];
    const int64_t head = unit % kv.n_kv_heads;
    std::vector<uint16_t> half(kv.type == PagedType::kF16 ? hd : 0);
    for (int64_t i = 0; i < span.n; ++i) {
      const int64_t position = span.start + i, lane = position % kBlock;
      const int64_t row = ((span.row + i) * kv.n_kv_heads + head) * hd;
      const int64_t at = (span.blocks[position / kBlock] * kv.n_kv_heads + head) * size;
      if (kv.type == PagedType::kInt8) {
        const bool finite = is_finite(k + row, v + row, hd, ops);
        put_codes(kv, static_cast<int8_t*>(kv.k) + at, k + row, lane, true, finite, ops);
        put_codes(kv, static_cast<int8_t*>(kv.v) + at, v + row, lane, false, finite, ops);
      } else if (kv.type == PagedType::kBF16) {
        const bool finite = is_finite(k + row, v + row, hd, ops);
        put_pairs(kv, static_cast<uint16_t*>(kv.k) + at, k + row, lane, true, finite);
        put_pairs(kv, static_cast<uint16_t*>(kv.v) + at, v + row, lane, false, finite);
      } else if (kv.type == PagedType::kF32) {
        float* key = static_cast<float*>(kv.k) + at + lane;
        for (int64_t d = 0; d < hd; ++d) key[d * kBlock] = k[row + d];
        std::copy_n(v + row, hd, static_cast<float*>(kv.v) + at + lane * hd);
      } else {
        uint16_t* key = static_cast<uint16_t*>(kv.k) + at + lane;
        ops.to_half(k + row, hd, half.data());
        for (int64_t d = 0; d < hd; ++d) key[d * kBlock] = half[d];
        ops.to_half(v + row, hd, static_cast<uint16_t*>(kv.v) + at + lane * hd);
      }
    }
  };
  pool.run(static_cast<int64_t>(spans.size()) * kv.n_kv_heads, put);
}

void paged_attention(const PagedKv& kv, std::span<const PagedSpan> spans, int64_t n_heads,
                     const float* q, float* out, const Ops& ops, ThreadPool& pool,
                     std::vector<PagedScratch>& scratch) {
  const int64_t step = tile_rows(n_heads / kv.n_kv_heads);
  std::vector<Tile> tiles;
  for (const PagedSpan& span : spans) {
    for (int64_t first = 0; first < span.n; first += step) {
      for (int64_t head = 0; head < kv.n_kv_heads; ++head) {
        tiles.push_back({&span, head, first, std::min(span.n, first + step)});
      }
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const Tile& a, const Tile& b) { return a.cost() > b.cost(); });
  pool.run(static_cast<int64_t>(tiles.size()), [&](int64_t i, int worker) {
    const size_t after = i + pool.size();
    const Tile* next = after < tiles.size() ? &tiles[after] : nullptr;
    attend_tile(kv, tiles[i], next, n_heads, q, out, ops, scratch[worker]);
  });
}

}  // namespace nearfar
