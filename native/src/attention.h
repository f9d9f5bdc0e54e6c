// The one attention routine: prefill, verify and decode are the same call.
//
// Unit of work: one KV head and a tile of rows.  Each block of keys and values is read once for all
// queries of the unit (rows times the query heads that share the KV head, 2305.13245), in position
// order, with an online softmax. So the bits of a row depend on its own query and the cache below
// it, not on tiles or threads.
#pragma once

#include <cstdint>
#include <vector>

#include "kv_cache.h"
#include "ops.h"
#include "threads.h"

namespace nearfar {

// Causal attention of rows at positions start..start+rows-1, whose K and V are in the cache
// already.  What a row sees is the cache's policy: everything before it, or a window and, from as
// far away as the window is wide at most, the sinks (LM-Infinite, 2308.16137): those outside the
// window by their unrotated keys and `far_q`, the query rotated to position `window`.
struct AttentionCall {
  const KvCache& kv;
  int layer;
  int64_t start, rows;
  int64_t n_heads;               // of queries, a multiple of the KV heads
  const float* q;                // [rows, n_heads * head_dim]
  float* out;                    // [rows, n_heads * head_dim]
  const float* far_q = nullptr;  // [rows, n_heads * head_dim]; read where sees_far_sinks()

  bool sees_far_sinks() const {
    const KvPolicy& policy = kv.shape().policy;
    return policy.sink > 0 && policy.window_begin(start + rows - 1) > 0;
  }
};

// Scratch of one thread, allocated at open: a converted block (or its scales), and the arrays of
// AttendBlock.
struct AttentionScratch {
  AttentionScratch(int64_t n_heads, int64_t n_kv_heads, int64_t head_dim);

  std::vector<float> block, scales, q, out, scores, max, sum;
  std::vector<int64_t> visible;
};

// Rows [first, last) of the call, the queries that share `kv_head`; at most tile_rows() of them.
void attend_tile(const AttentionCall& call, int64_t kv_head, int64_t first, int64_t last,
                 const Ops& ops, AttentionScratch& scratch);
int64_t tile_rows(int64_t heads_per_kv_head);

// All units, over the pool; scratch[worker] for each of its threads.
void attention(const AttentionCall& call, const Ops& ops, ThreadPool& pool,
               std::vector<AttentionScratch>& scratch);

}  // namespace nearfar
