#include "kv_cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "check.h"
#include "errors.h"
#include "half.h"
#include "threads.h"

namespace nearfar {
namespace {

constexpr const char* kBusy = "the KV cache is in use by another thread";

int64_t blocks_for(int64_t positions) { return (positions + kBlock - 1) / kBlock; }

// x [n], n <= kInt8Group -> codes, and the scale that they are multiples of: the largest becomes
// 127.  The scale is rounded to f16 first, so that codes fit the scale that is read back.
uint16_t quantize_group(const float* x, int64_t n, int8_t* codes) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(x[i]));
  const uint16_t half = f32_to_f16(std::min(largest / 127.0f, 65504.0f));
  const float scale = f16_to_f32(half);
  for (int64_t i = 0; i < n; ++i) {
    const float code = scale > 0 ? std::clamp(x[i] / scale, -127.0f, 127.0f) : 0.0f;
    codes[i] = static_cast<int8_t>(std::lrintf(code));
  }
  return half;
}

}  // namespace

KvType kv_type(std::string_view name) {
  if (name == "f16") return KvType::kF16;
  if (name == "f32") return KvType::kF32;
  if (name == "int8") return KvType::kInt8;
  throw std::invalid_argument("KV dtype \"" + std::string(name) + "\": expected f16, f32 or int8");
}

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
  const KvPolicy& p = shape.policy;
  if (p.sink < 0 || p.sink > kMaxWindow || p.window < 0 || p.window > kMaxWindow) {
    throw std::invalid_argument("sink=" + std::to_string(p.sink) +
                                ", window=" + std::to_string(p.window) + ": expected 0.." +
                                std::to_string(kMaxWindow) + " positions");
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
  for (int layer = shape_.first; layer < shape_.last; ++layer) check_cut(at(layer), n);
  for (int layer = shape_.first; layer < shape_.last; ++layer) cut(at(layer), n);
}

void KvCache::check_cut(const Layer& layer, int64_t n) const {
  const int64_t length = layer.length, oldest = layer.first_block * kBlock;
  if (n == 0 || n >= length || oldest <= shape_.policy.window_begin(n)) return;
  throw KvTruncated("cut to " + std::to_string(n) + " positions: the cache holds " +
                    std::to_string(oldest) + " to " + std::to_string(length) +
                    " only, and a window of " + std::to_string(shape_.policy.window) +
                    " ends there; cut to 0 and run the text again");
}

void KvCache::cut(Layer& layer, int64_t n) const {
  if (n < layer.length) layer.length = n;
  if (layer.length == 0) layer.first_block = 0;
  layer.n_kept = layer.length;
  layer.first_kept = layer.first_block;
  // A failed append may have left one more block than there are positions.
  layer.blocks.resize(blocks_for(layer.length) - layer.first_block);
  layer.sinks.resize(std::min<size_t>(layer.sinks.size(), blocks_for(layer.length)));
}

void KvCache::keep(int layer) {
  Layer& l = at(layer);
  forget(l);
  l.forgotten.clear();
  l.n_kept = l.length;
  l.first_kept = l.first_block;
}

void KvCache::take_back(int layer) {
  Layer& l = at(layer);
  if (!l.forgotten.empty()) {
    l.first_block = l.first_kept;
    l.forgotten.insert(l.forgotten.end(), l.blocks.begin(), l.blocks.end());
    l.blocks.swap(l.forgotten);
    l.forgotten.clear();
  }
  cut(l, l.n_kept);
}

void KvCache::forget(Layer& layer) const {
  if (!shape_.policy.has_window()) return;
  const int64_t oldest = layer.length - shape_.policy.window - kSlack;
  const int64_t n = std::max<int64_t>(0, oldest) / kBlock - layer.first_block;
  if (n <= 0) return;
  const auto begin = layer.blocks.begin(), end = begin + n;
  // Those that the call at work found come back if it fails; those that it made itself do not.
  const int64_t n_found = std::clamp<int64_t>(blocks_for(layer.n_kept) - layer.first_block, 0, n);
  layer.forgotten.insert(layer.forgotten.end(), begin, begin + n_found);
  layer.blocks.erase(begin, end);
  layer.first_block += n;
}

std::unique_ptr<KvCache> KvCache::fork(int64_t n) const {
  if (n < 0)
    throw std::invalid_argument("fork(" + std::to_string(n) + "): expected 0 or more positions");
  const Occupied occupied(in_use_, kBusy);
  auto other = std::make_unique<KvCache>(shape_);
  for (int layer = shape_.first; layer < shape_.last; ++layer) {
    const Layer& from = at(layer);
    check_cut(from, n);
    Layer& to = other->at(layer);
    to.blocks = from.blocks;
    to.sinks = from.sinks;
    to.first_block = from.first_block;
    to.length = from.length.load();
    cut(to, n);
    if (to.length % kBlock != 0) to.blocks.back() = std::make_shared<Block>(*to.blocks.back());
  }
  return other;
}

size_t KvCache::n_bytes() const {
  const Occupied occupied(in_use_, kBusy);
  size_t n = 0;
  for (int layer = shape_.first; layer < shape_.last; ++layer) {
    for (const Blocks* list : {&at(layer).blocks, &at(layer).sinks}) {
      for (const auto& block : *list) n += block->n_bytes;
    }
  }
  return n;
}

size_t KvCache::head_bytes() const {
  const size_t n = 2 * padded_head_dim_ * kBlock;
  switch (shape_.type) {
    case KvType::kF32:
      return n * sizeof(float);
    case KvType::kF16:
      return n * sizeof(uint16_t);
    default:
      return n + 2 * int8_groups(padded_head_dim_) * kBlock * sizeof(uint16_t);
  }
}

std::shared_ptr<KvCache::Block> KvCache::new_block() const {
  return std::make_shared<Block>(shape_.n_kv_heads * head_bytes());
}

KvCache::Block& KvCache::writable(Blocks& blocks, size_t index) const {
  NF_DCHECK(index <= blocks.size());
  if (index == blocks.size()) {
    blocks.push_back(new_block());
  } else if (blocks[index].use_count() > 1) {
    blocks[index] = std::make_shared<Block>(*blocks[index]);
  }
  return *blocks[index];
}

int64_t KvCache::sinks_among(int64_t start, int64_t rows) const {
  if (!shape_.policy.has_window()) return 0;
  return std::clamp<int64_t>(shape_.policy.sink - start, 0, rows);
}

void KvCache::append(int layer, const Rows& r, const Ops& ops) {
  Layer& l = at(layer);
  NF_DCHECK(l.length + r.rows <= shape_.max_len);
  forget(l);
  const int64_t width = shape_.n_kv_heads * shape_.head_dim, start = l.length;
  // Pieces of one block each: work(index of the block, position in it, first row, rows).
  const auto in_blocks = [start](int64_t rows, auto work) {
    for (int64_t done = 0; done < rows;) {
      const int64_t position = (start + done) % kBlock,
                    n = std::min(rows - done, kBlock - position);
      work((start + done) / kBlock, position, done, n);
      done += n;
    }
  };
  in_blocks(sinks_among(start, r.rows), [&](int64_t index, int64_t position, int64_t i, int64_t n) {
    write(writable(l.sinks, index), position, r.plain_k + i * width, r.v + i * width, n, ops);
  });
  in_blocks(r.rows, [&](int64_t index, int64_t position, int64_t i, int64_t n) {
    write(writable(l.blocks, index - l.first_block), position, r.k + i * width, r.v + i * width, n,
          ops);
    l.length += n;
  });
}

void KvCache::write(Block& block, int64_t position, const float* k, const float* v, int64_t rows,
                    const Ops& ops) const {
  switch (shape_.type) {
    case KvType::kF32:
      return write_floats<float>(block, position, k, v, rows, ops);
    case KvType::kF16:
      return write_floats<uint16_t>(block, position, k, v, rows, ops);
    case KvType::kInt8:
      return write_int8(block, position, k, v, rows);
  }
}

template <typename T>
void KvCache::write_floats(Block& block, int64_t position, const float* k, const float* v,
                           int64_t rows, const Ops& ops) const {
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

void KvCache::write_int8(Block& block, int64_t position, const float* k, const float* v,
                         int64_t rows) const {
  const int64_t hd = shape_.head_dim, part = padded_head_dim_ * kBlock;
  const int64_t n_groups = int8_groups(padded_head_dim_);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t j = position + row;
    for (int64_t head = 0; head < shape_.n_kv_heads; ++head) {
      int8_t* keys = reinterpret_cast<int8_t*>(block.data + head * head_bytes());
      int8_t* values = keys + part;
      uint16_t* key_scales = reinterpret_cast<uint16_t*>(values + part);
      uint16_t* value_scales = key_scales + n_groups * kBlock;
      const int64_t from = (row * shape_.n_kv_heads + head) * hd;
      for (int64_t d = 0; d < hd; d += kInt8Group) {
        const int64_t n = std::min(kInt8Group, hd - d), g = d / kInt8Group;
        int8_t codes[kInt8Group];
        key_scales[g * kBlock + j] = quantize_group(k + from + d, n, codes);
        for (int64_t i = 0; i < n; ++i) keys[(d + i) * kBlock + j] = codes[i];
        value_scales[j * n_groups + g] =
            quantize_group(v + from + d, n, values + j * padded_head_dim_ + d);
      }
    }
  }
}

const void* KvCache::block(int layer, int64_t index, int64_t head) const {
  const Layer& l = at(layer);
  NF_DCHECK(index >= l.first_block);
  return l.blocks[index - l.first_block]->data + head * head_bytes();
}

const void* KvCache::sinks(int layer, int64_t index, int64_t head) const {
  return at(layer).sinks[index]->data + head * head_bytes();
}

}  // namespace nearfar
