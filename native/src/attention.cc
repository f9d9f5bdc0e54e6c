#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"

namespace nearfar {
namespace {

// Converting a block to f32 costs about as much as one query; its 64 accumulators stay in L1 or L2.
constexpr int64_t kTileQueries = 64;
// Multiplications below which a second thread costs more than it brings: a few microseconds.
constexpr int64_t kAloneBelow = 1 << 16;

}  // namespace

int64_t tile_rows(int64_t heads_per_kv_head) {
  return std::max<int64_t>(1, kTileQueries / heads_per_kv_head);
}

AttentionScratch::AttentionScratch(int64_t n_heads, int64_t n_kv_heads, int64_t head_dim) {
  const int64_t group = n_heads / n_kv_heads, n_queries = tile_rows(group) * group;
  const int64_t padded = (head_dim + 15) / 16 * 16;
  block.resize(2 * padded * kBlock);
  q.resize(n_queries * padded);
  out.resize(n_queries * padded);
  scores.resize(n_queries * kBlock);
  max.resize(n_queries);
  sum.resize(n_queries);
  visible.resize(n_queries);
}

void attend_tile(const AttentionCall& call, int64_t kv_head, int64_t first, int64_t last,
                 const Ops& ops, AttentionScratch& s) {
  const int64_t hd = call.kv.shape().head_dim, padded = call.kv.padded_head_dim();
  const int64_t group = call.n_heads / call.kv.shape().n_kv_heads;
  const int64_t n_queries = (last - first) * group;
  NF_DCHECK(n_queries <= static_cast<int64_t>(s.max.size()));

  // Query (row, g) of the call -> row `(row - first) * group + g` of the scratch, padded with
  // zeros.
  const auto place = [&](int64_t query) {
    return ((first + query / group) * call.n_heads + kv_head * group + query % group) * hd;
  };
  std::fill_n(s.q.begin(), n_queries * padded, 0.0f);
  std::fill_n(s.out.begin(), n_queries * padded, 0.0f);
  std::fill_n(s.max.begin(), n_queries, -std::numeric_limits<float>::infinity());
  std::fill_n(s.sum.begin(), n_queries, 0.0f);
  for (int64_t i = 0; i < n_queries; ++i) {
    std::copy_n(call.q + place(i), hd, s.q.begin() + i * padded);
  }

  const int64_t end = call.start + last;  // positions below it are visible to the last row
  for (int64_t begin = 0; begin < end; begin += kBlock) {
    for (int64_t i = 0; i < n_queries; ++i) {
      s.visible[i] = std::clamp<int64_t>(call.start + first + i / group + 1 - begin, 0, kBlock);
    }
    const void* block = call.kv.block(call.layer, begin / kBlock, kv_head);
    const auto attend = [&]<typename Number>(auto function, const Number* k) {
      function(AttendBlock<Number>{.n_queries = n_queries,
                                   .head_dim = padded,
                                   .q = s.q.data(),
                                   .k = k,
                                   .v = k + padded * kBlock,
                                   .visible = s.visible.data(),
                                   .scale = 1.0f / std::sqrt(static_cast<float>(hd)),
                                   .scores = s.scores.data(),
                                   .max = s.max.data(),
                                   .sum = s.sum.data(),
                                   .out = s.out.data()});
    };
    if (call.kv.shape().type == KvType::kF32) {
      attend(ops.attend_f32, static_cast<const float*>(block));
    } else if (n_queries <= kFewQueries) {
      attend(ops.attend_f16, static_cast<const uint16_t*>(block));
    } else {
      const int64_t n_values = std::min(kBlock, end - begin) * padded;
      ops.from_half(static_cast<const uint16_t*>(block), padded * kBlock + n_values,
                    s.block.data());
      attend(ops.attend_f32, static_cast<const float*>(s.block.data()));
    }
  }
  for (int64_t i = 0; i < n_queries; ++i) {
    float* out = call.out + place(i);
    for (int64_t d = 0; d < hd; ++d) out[d] = s.out[i * padded + d] / s.sum[i];
  }
}

void attention(const AttentionCall& call, const Ops& ops, ThreadPool& pool,
               std::vector<AttentionScratch>& scratch) {
  const int64_t n_kv_heads = call.kv.shape().n_kv_heads;
  const int64_t tile = tile_rows(call.n_heads / n_kv_heads);
  const int64_t n_tiles = (call.rows + tile - 1) / tile;
  const auto work = [&](int64_t unit, int worker) {
    const int64_t first = unit / n_kv_heads * tile;
    attend_tile(call, unit % n_kv_heads, first, std::min(call.rows, first + tile), ops,
                scratch[worker]);
  };
  const int64_t cost =
      2 * call.rows * (call.start + call.rows) * call.n_heads * call.kv.shape().head_dim;
  pool.run(n_kv_heads * n_tiles, work, cost < kAloneBelow);
}

}  // namespace nearfar
