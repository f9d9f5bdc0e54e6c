// Keys and values of one sequence: per layer a list of reference-counted blocks of 64 positions.
//
// A block holds, for each KV head, K as [head_dim][64] and V as [64][head_dim] (head_dim padded to
// a multiple of 16 with zeros), in f16, f32 or int8: scores run over 64 positions at a time, values
// over the numbers of a head, and neither needs a horizontal sum.  int8 codes of -127..127 have an
// f16 scale for each kInt8Group numbers of a head and position: behind K and V the scales of K as
// [head_dim / 32][64], then those of V as [64][head_dim / 32].
//
//     layer 0   [block][block][bl··]    length 151    truncate(n) drops blocks
//     layer 1   [block][block][bl··]    length 151    fork(n) shares full blocks, copies the rest
//     layer 2   [block][b···]           length  70    layers above an exit may lag
//
// With a window (LM-Infinite, 2308.16137) a layer keeps the last `window` positions and kSlack
// more, in whole blocks, and the first `sink` positions a second time, their keys not rotated:
//
//     layer 0   sinks [bl··]      gone    gone   [block][block][bl··]    length 10000
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "ops.h"

namespace nearfar {

enum class KvType : uint8_t { kF16, kF32, kInt8 };

// "f16", "f32", "int8".  Throws std::invalid_argument on another name.
KvType kv_type(std::string_view name);

// Positions that may be cut off and still leave the window before them whole: drafts, owed rows.
constexpr int64_t kSlack = 64;
constexpr int64_t kMaxWindow = INT32_MAX;

// What a row at position i sees of j <= i: everything (window 0), or j < sink and i - j < window.
struct KvPolicy {
  int64_t sink = 0, window = 0;

  bool has_window() const { return window > 0; }
  // The first position of a row's window.
  int64_t window_begin(int64_t i) const { return has_window() && i >= window ? i - window + 1 : 0; }
};

struct KvShape {
  int first, last;  // the layers [first, last)
  int64_t n_kv_heads, head_dim;
  int64_t max_len;  // positions
  KvType type;
  KvPolicy policy = {};
};

class KvCache {
 public:
  // Allocates nothing but the layer table.  Throws std::invalid_argument on a size below 1.
  explicit KvCache(const KvShape& shape);
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  const KvShape& shape() const { return shape_; }
  int64_t padded_head_dim() const { return padded_head_dim_; }

  // Positions that `layer` has run.  Throws std::invalid_argument for a layer that is not held
  // here.
  int64_t length(int layer) const;
  // Forgets the positions from n on, in every layer that has them.  Throws EngineBusy while the
  // cache is in use, and KvTruncated, with nothing forgotten, where the window before n is gone:
  // after a cut of kSlack at most it never is, and n = 0 always works.
  void truncate(int64_t n);
  // An independent cache with the first n positions of every layer; freeing either leaves the other
  // whole. Copies at most one block a layer.  Throws as truncate.
  std::unique_ptr<KvCache> fork(int64_t n) const;
  // Bytes of the blocks referred to, shared ones included.
  size_t n_bytes() const;

  // -- for the engine, which holds `in_use` meanwhile --

  // New rows of keys, rotated and, where they may be sinks (below), as they were before; of values.
  struct Rows {
    const float *k, *plain_k, *v;  // each [rows, n_kv_heads * head_dim]
    int64_t rows;
  };
  // How many of `rows` new positions from `start` on need a `plain_k`: the first ones.
  int64_t sinks_among(int64_t start, int64_t rows) const;
  // Rounds the rows to the cache's type and adds them, after it has forgotten blocks that no row
  // from here on sees. Requires room. Throws std::bad_alloc, and then some rows may have been
  // added: the caller takes them back.
  void append(int layer, const Rows& rows, const Ops& ops);
  // A call ends: what it added and forgot stays so, or is as before.
  void keep(int layer);
  void take_back(int layer);
  // Block `index` of `layer`, head `head`, in the cache's type: K, V, scales.  `sinks`: block
  // `index` of those.
  const void* block(int layer, int64_t index, int64_t head) const;
  const void* sinks(int layer, int64_t index, int64_t head) const;

  std::atomic_flag& in_use() const { return in_use_; }

 private:
  // Bytes of one block, 64-byte aligned.  A block that two caches refer to is never written to.
  struct Block;
  using Blocks = std::vector<std::shared_ptr<Block>>;
  struct Layer {
    Blocks blocks;     // positions from first_block * kBlock on
    Blocks sinks;      // positions [0, policy.sink), keys not rotated
    Blocks forgotten;  // by the call at work: those before `blocks` that it found
    int64_t first_block = 0;
    int64_t n_kept = 0, first_kept = 0;  // positions and first block before the call at work
    std::atomic<int64_t> length{0};      // atomic for those who look on while the engine works
  };
  size_t head_bytes() const;  // of one head in a block
  std::shared_ptr<Block> new_block() const;
  Layer& at(int layer);
  const Layer& at(int layer) const;
  void check_cut(const Layer& layer, int64_t n) const;
  void cut(Layer& layer, int64_t n) const;
  // Drops the blocks that lie more than kSlack before the window of the next row.
  void forget(Layer& layer) const;
  // Block `index` of the list, to write to: new, or its own copy if it is shared.
  Block& writable(Blocks& blocks, size_t index) const;
  void write(Block& block, int64_t position, const float* k, const float* v, int64_t rows,
             const Ops& ops) const;
  template <typename T>
  void write_floats(Block& block, int64_t position, const float* k, const float* v, int64_t rows,
                    const Ops& ops) const;
  void write_int8(Block& block, int64_t position, const float* k, const float* v,
                  int64_t rows) const;

  KvShape shape_;
  int64_t padded_head_dim_;
  std::unique_ptr<Layer[]> layers_;
  mutable std::atomic_flag in_use_ = ATOMIC_FLAG_INIT;
};

}  // namespace nearfar
