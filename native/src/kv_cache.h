// Keys and values of one sequence: per layer a list of reference-counted blocks of 64 positions.
//
// A block holds, for each KV head, K as [head_dim][64] and V as [64][head_dim] (head_dim padded to
// a multiple of 16 with zeros), in f16 or f32: scores run over 64 positions at a time, values over
// the numbers of a head, and neither needs a horizontal sum.
//
//     layer 0   [block][block][bl··]      length 151     truncate(n) drops blocks
//     layer 1   [block][block][bl··]      length 151     fork(n) shares full blocks, copies the
//     partial one layer 2   [block][b···]             length  70     layers above an exit may lag
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "ops.h"

namespace nearfar {

enum class KvType : uint8_t { kF16, kF32 };

struct KvShape {
  int first, last;  // the layers [first, last)
  int64_t n_kv_heads, head_dim;
  int64_t max_len;  // positions
  KvType type;
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
  // cache is in use.
  void truncate(int64_t n);
  // An independent cache with the first n positions of every layer; freeing either leaves the other
  // whole. Copies at most one block a layer.  Throws EngineBusy while the cache is in use.
  std::unique_ptr<KvCache> fork(int64_t n) const;
  // Bytes of the blocks referred to, shared ones included.
  size_t n_bytes() const;

  // -- for the engine, which holds `in_use` meanwhile --

  // Rounds k and v, each [rows, n_kv_heads * head_dim], to the cache's type and adds them. Requires
  // room. Throws std::bad_alloc, and then some rows may have been added: the caller shortens the
  // layer.
  void append(int layer, const float* k, const float* v, int64_t rows, const Ops& ops);
  void shorten(int layer, int64_t n);
  // Block `index` of `layer`, head `head`: K, and V padded_head_dim * kBlock numbers behind it, in
  // the cache's type.
  const void* block(int layer, int64_t index, int64_t head) const;

  std::atomic_flag& in_use() const { return in_use_; }

 private:
  // Bytes of one block, 64-byte aligned.  A block that two caches refer to is never written to.
  struct Block;
  struct Layer {
    std::vector<std::shared_ptr<Block>> blocks;
    std::atomic<int64_t> length{0};  // atomic for those who look on while the engine works
  };
  size_t head_bytes() const;  // of K and V of one head in a block
  std::shared_ptr<Block> new_block() const;
  Layer& at(int layer);
  const Layer& at(int layer) const;
  // The block that position `length` goes to: new, or its own copy if it is shared.
  Block& writable_tail(Layer& layer);
  template <typename T>
  void write(Block& block, int64_t position, const float* k, const float* v, int64_t rows,
             const Ops& ops) const;

  KvShape shape_;
  int64_t padded_head_dim_;
  std::unique_ptr<Layer[]> layers_;
  mutable std::atomic_flag in_use_ = ATOMIC_FLAG_INIT;
};

}  // namespace nearfar
