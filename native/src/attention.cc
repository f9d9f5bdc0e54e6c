#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "check.h"

namespace nearfar {
namespace {

// Converting a block to f32 costs about as much as one query; its 64 accumulators stay in L1 or L2.
constexpr int64_t kTileQueries = 64;
// Multiplications below which a second thread costs more than it brings: a few microseconds.
constexpr int64_t kAloneBelow = 1 << 16;

// One step over a block that holds `n_positions`, for the queries and what they see in `s`.
void attend_block(const KvCache& kv, const void* block, int64_t n_positions, int64_t n_queries,
                  const Ops& ops, AttentionScratch& s) {
  const int64_t padded = kv.padded_head_dim(), part = padded * kBlock;
  const auto step = [&]<typename Number>(const Number* k) {
    return AttendBlock<Number>{.n_queries = n_queries,
                               .head_dim = padded,
                               .q = s.q.data(),
                               .k = k,
                               .v = k + part,
                               .k_scales = s.scales.data(),
                               .v_scales = s.scales.data() + int8_groups(padded) * kBlock,
                               .visible = s.visible.data(),
                               .scale = 1.0f / std::sqrt(static_cast<float>(kv.shape().head_dim)),
                               .scores = s.scores.data(),
                               .max = s.max.data(),
                               .sum = s.sum.data(),
                               .out = s.out.data()};
  };
  const auto f32 = step(static_cast<const float*>(s.block.data()));
  switch (kv.shape().type) {
    case KvType::kF32:
      return ops.attend_f32(step(static_cast<const float*>(block)));
    case KvType::kF16: {
      const auto f16 = step(static_cast<const uint16_t*>(block));
      if (n_queries <= kFewQueries) return ops.attend_f16(f16);
      ops.from_half(f16.k, part + n_positions * padded, s.block.data());
      return ops.attend_f32(f32);
    }
    case KvType::kInt8: {
      const auto int8 = step(static_cast<const int8_t*>(block));
      ops.from_half(reinterpret_cast<const uint16_t*>(int8.v + part),
                    static_cast<int64_t>(s.scales.size()), s.scales.data());
      if (n_queries <= kFewQueries) return ops.attend_int8(int8);
      ops.from_int8(int8, s.block.data(), s.block.data() + part);
      return ops.attend_f32(f32);
    }
  }
}

}  // namespace

int64_t tile_rows(int64_t heads_per_kv_head) {
  return std::max<int64_t>(1, kTileQueries / heads_per_kv_head);
}

AttentionScratch::AttentionScratch(int64_t n_heads, int64_t n_kv_heads, int64_t head_dim) {
  const int64_t group = n_heads / n_kv_heads, n_queries = tile_rows(group) * group;
  const int64_t padded = (head_dim + 15) / 16 * 16;
  block.resize(2 * padded * kBlock);
  scales.resize(2 * int8_groups(padded) * kBlock);
  q.resize(n_queries * padded);
  out.resize(n_queries * padded);
  scores.resize(n_queries * kBlock);
  max.resize(n_queries);
  sum.resize(n_queries);
  visible.resize(2 * n_queries);
}

void attend_tile(const AttentionCall& call, int64_t kv_head, int64_t first, int64_t last,
                 const Ops& ops, AttentionScratch& s) {
  const KvPolicy& policy = call.kv.shape().policy;
  const int64_t hd = call.kv.shape().head_dim, padded = call.kv.padded_head_dim();
  const int64_t group = call.n_heads / call.kv.shape().n_kv_heads;
  const int64_t n_queries = (last - first) * group;
  NF_DCHECK(n_queries <= static_cast<int64_t>(s.max.size()));

  // Query (row, g) of the call -> row `(row - first) * group + g` of the scratch, padded with
  // zeros.
  const auto place = [&](int64_t query) {
    return ((first + query / group) * call.n_heads + kv_head * group + query % group) * hd;
  };
  const auto take = [&](const float* q) {
    std::fill_n(s.q.begin(), n_queries * padded, 0.0f);
    for (int64_t i = 0; i < n_queries; ++i) {
      std::copy_n(q + place(i), hd, s.q.begin() + i * padded);
    }
  };
  // One block, of which the query at `position` sees what seen(position) says: [begin, end) of the
  // sequence.
  const auto attend = [&](const void* block, int64_t begin, int64_t end, auto seen) {
    for (int64_t i = 0; i < n_queries; ++i) {
      const auto [from, to] = seen(call.start + first + i / group);
      s.visible[2 * i] = std::clamp<int64_t>(from - begin, 0, kBlock);
      s.visible[2 * i + 1] = std::clamp<int64_t>(to - begin, 0, kBlock);
    }
    attend_block(call.kv, block, std::min(kBlock, end - begin), n_queries, ops, s);
  };
  std::fill_n(s.out.begin(), n_queries * padded, 0.0f);
  std::fill_n(s.max.begin(), n_queries, -std::numeric_limits<float>::infinity());
  std::fill_n(s.sum.begin(), n_queries, 0.0f);

  const int64_t end = call.start + last;  // positions below it are visible to the last row
  const auto n_far = [&](int64_t i) { return std::min(policy.sink, policy.window_begin(i)); };
  if (const int64_t n = n_far(end - 1); n > 0) {
    take(call.far_q);
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      attend(call.kv.sinks(call.layer, begin / kBlock, kv_head), begin, n,
             [&](int64_t i) { return std::pair(int64_t{0}, n_far(i)); });
    }
  }
  take(call.q);
  const int64_t oldest = policy.window_begin(call.start + first);
  for (int64_t begin = oldest / kBlock * kBlock; begin < end; begin += kBlock) {
    attend(call.kv.block(call.layer, begin / kBlock, kv_head), begin, end,
           [&](int64_t i) { return std::pair(policy.window_begin(i), i + 1); });
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
  const int64_t seen = call.start + call.rows - call.kv.shape().policy.window_begin(call.start);
  const int64_t cost = 2 * call.rows * seen * call.n_heads * call.kv.shape().head_dim;
  pool.run(n_kv_heads * n_tiles, work, cost < kAloneBelow);
}

}  // namespace nearfar
