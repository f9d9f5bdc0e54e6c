#include "kv_cache.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "check.h"
#include "threads.h"

namespace nearfar {
namespace {

constexpr const char* kBusy = "the KV cache is in use by another thread";

int64_t blocks_for(int64_t positions) { return (positions + kBlock - 1) / kBlock; }

}  // namespace

struct KvCache::Block {
  explicit Block(size_t n_bytes)
      : n_bytes(n_bytes),
        data(static_cast<std::byte*>(::operator new(n_bytes, std::align_val_t{64}))) {
    std::memset(data, 0,
                n_bytes);  // padding must be zero, positions not yet written must be finite
  }
  Block(const Block& other) : Block(other.n_bytes) { std::memcpy(data, other.data, n_bytes); }
  Block& operator=(const Block&) = delete;
  ~Block() { ::operator delete(data, std::align_val_t{64}); }

  size_t n_bytes;
  std::byte* data;
};

KvCache::KvCache(const KvShape& shape)
    : shape_(shape), padded_head_dim_((shape.head_dim + 15) / 16 * 16) {
  if (shape.first < 0 || shape.last <= shape.first || shape.n_kv_heads < 1 || shape.head_dim < 1) {
    throw std::invalid_argument("KV cache: expected at least one layer, head and number a head");
  }
  if (shape.max_len < 1) {
    throw std::invalid_argument("max_len=" + std::to_string(shape.max_len) +
                                ": expected at least 1 position");
  }
  layers_ = std::make_unique<Layer[]>(shape.last - shape.first);
}

KvCache::Layer& KvCache::at(int layer) {
  return const_cast<Layer&>(std::as_const(*this).at(layer));
}

const KvCache::Layer& KvCache::at(int layer) const {
  if (layer < shape_.first || layer >= shape_.last) {
    throw std::invalid_argument("layer " + std::to_string(layer) + ": the cache holds [" +
                                std::to_string(shape_.first) + ", " + std::to_string(shape_.last) +
                                ")");
  }
  return layers_[layer - shape_.first];
}

int64_t KvCache::length(int layer) const {
  return at(layer).length.load(std::memory_order_relaxed);
}

void KvCache::truncate(int64_t n) {
  if (n < 0)
    throw std::invalid_argument("truncate(" + std::to_string(n) +
                                "): expected 0 or more positions");
  const Occupied occupied(in_use_, kBusy);
  for (int layer = shape_.first; layer < shape_.last; ++layer) shorten(layer, n);
}

void KvCache::shorten(int layer, int64_t n) {
  Layer& l = at(layer);
  if (n >= l.length) {
    l.blocks.resize(blocks_for(l.length));  // a failed append may have left one more
    return;
  }
  l.blocks.resize(blocks_for(n));
  l.length = n;
}

std::unique_ptr<KvCache> KvCache::fork(int64_t n) const {
  if (n < 0)
    throw std::invalid_argument("fork(" + std::to_string(n) + "): expected 0 or more positions");
  const Occupied occupied(in_use_, kBusy);
  auto other = std::make_unique<KvCache>(shape_);
  for (int layer = shape_.first; layer < shape_.last; ++layer) {
    const Layer& from = at(layer);
    Layer& to = other->at(layer);
    to.length = std::min<int64_t>(n, from.length);
    to.blocks.assign(from.blocks.begin(), from.blocks.begin() + blocks_for(to.length));
    if (to.length % kBlock != 0) to.blocks.back() = std::make_shared<Block>(*to.blocks.back());
  }
  return other;
}

size_t KvCache::n_bytes() const {
  const Occupied occupied(in_use_, kBusy);
  size_t n = 0;
  for (int layer = shape_.first; layer < shape_.last; ++layer) {
    for (const auto& block : at(layer).blocks) n += block->n_bytes;
  }
  return n;
}

size_t KvCache::head_bytes() const {
  const size_t number = shape_.type == KvType::kF16 ? sizeof(uint16_t) : sizeof(float);
  return 2 * padded_head_dim_ * kBlock * number;
}

std::shared_ptr<KvCache::Block> KvCache::new_block() const {
  return std::make_shared<Block>(shape_.n_kv_heads * head_bytes());
}

KvCache::Block& KvCache::writable_tail(Layer& layer) {
  const size_t index = layer.length / kBlock;
  if (index == layer.blocks.size()) {
    layer.blocks.push_back(new_block());
  } else if (layer.blocks[index].use_count() > 1) {  // full when it was shared, then truncated
    layer.blocks[index] = std::make_shared<Block>(*layer.blocks[index]);
  }
  return *layer.blocks[index];
}

void KvCache::append(int layer, const float* k, const float* v, int64_t rows, const Ops& ops) {
  Layer& l = at(layer);
  NF_DCHECK(l.length + rows <= shape_.max_len);
  const int64_t width = shape_.n_kv_heads * shape_.head_dim;
  while (rows > 0) {
    const int64_t position = l.length % kBlock;
    const int64_t n = std::min(rows, kBlock - position);
    Block& block = writable_tail(l);
    if (shape_.type == KvType::kF16) {
      write<uint16_t>(block, position, k, v, n, ops);
    } else {
      write<float>(block, position, k, v, n, ops);
    }
    l.length += n;
    k += n * width, v += n * width, rows -= n;
  }
}

template <typename T>
void KvCache::write(Block& block, int64_t position, const float* k, const float* v, int64_t rows,
                    const Ops& ops) const {
  const int64_t hd = shape_.head_dim, part = padded_head_dim_ * kBlock;
  const auto convert = [&](const float* from, int64_t n, T* to) {
    if constexpr (std::is_same_v<T, float>) {
      std::copy_n(from, n, to);
    } else {
      ops.to_half(from, n, to);
    }
  };
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t head = 0; head < shape_.n_kv_heads; ++head) {
      T* keys = reinterpret_cast<T*>(block.data) + head * 2 * part;
      T* values = keys + part;
      const int64_t from = (row * shape_.n_kv_heads + head) * hd;
      for (int64_t d = 0; d < hd; d += 16) {  // by registers, for K is written across the rows
        T key[16];
        const int64_t n = std::min<int64_t>(16, hd - d);
        convert(k + from + d, n, key);
        for (int64_t i = 0; i < n; ++i) keys[(d + i) * kBlock + position + row] = key[i];
      }
      convert(v + from, hd, values + (position + row) * padded_head_dim_);
    }
  }
}

const void* KvCache::block(int layer, int64_t index, int64_t head) const {
  return at(layer).blocks[index]->data + head * head_bytes();
}

}  // namespace nearfar
