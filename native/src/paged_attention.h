// Attention over paged keys and values: the rows of many sequences in one call.
//
// All sequences share one store of blocks of 64 positions; a sequence is a list of block numbers.
// Prefill, decode and the check of drafts are the same call, and a row's bits depend on its own
// query and the positions below it, not on who else is in the batch: see attention.h.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kv_cache.h"
#include "ops.h"
#include "threads.h"

namespace nearfar {

enum class PagedType : uint8_t { kF32, kF16, kBF16, kInt8 };

// The blocks of one layer.  head_dim is a multiple of 16.
struct PagedKv {
  PagedType type;
  int64_t n_blocks, n_kv_heads, head_dim;
  void* k;  // [n_blocks, n_kv_heads, head_dim, 64]: a lane is a position
  void* v;  // [n_blocks, n_kv_heads, 64, head_dim]
  // bf16 and int8 lie in pairs: K [.., head_dim / 2, 64, 2] and V [.., 32, head_dim, 2]; head_dim
  // is then a multiple of 32, and who writes position 0 of a block makes the others zeros. int8 has
  // a scale for each position of a head, f32 [64] behind its codes.

  // Numbers of one head of a block; of int8 bytes, with the scales.
  int64_t head_size() const {
    return head_dim * kBlock + (type == PagedType::kInt8 ? kBlock * 4 : 0);
  }
  int64_t number_bytes() const {
    return type == PagedType::kF32 ? 4 : type == PagedType::kInt8 ? 1 : 2;
  }
};

// Rows [row, row + n) of a call stand at positions [start, start + n) of a sequence, whose blocks
// are listed from position 0 on.
struct PagedSpan {
  int64_t row, n, start;
  const int32_t* blocks;
};

// Rounds k and v [rows, n_kv_heads, head_dim] of the spans to the type of the store and puts them
// into their blocks.  The blocks that spans write to must be different ones.
void paged_append(const PagedKv& kv, std::span<const PagedSpan> spans, const float* k,
                  const float* v, const Ops& ops, ThreadPool& pool);

// Scratch of one thread.
struct PagedScratch {
  PagedScratch(int64_t n_heads, int64_t n_kv_heads, int64_t head_dim);

  std::vector<float> q, out, scores, max, sum, block;
  std::vector<uint16_t> q16, pairs;
  std::vector<int64_t> visible;
};

// Causal attention of q [rows, n_heads, head_dim] -> out, the same shape; the spans' own keys and
// values are in the store.  scratch[worker] for each thread of the pool.
void paged_attention(const PagedKv& kv, std::span<const PagedSpan> spans, int64_t n_heads,
                     const float* q, float* out, const Ops& ops, ThreadPool& pool,
                     std::vector<PagedScratch>& scratch);

}  // namespace nearfar
