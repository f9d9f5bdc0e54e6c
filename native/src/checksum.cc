#include "checksum.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace nearfar {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr int kLanes = 16;  // eight 16-byte registers: enough chains to hide the latency of a step
constexpr size_t kBlock = kLanes * sizeof(uint64_t);
constexpr size_t kAhead =
    2048;  // bytes: a third more from memory than the hardware's prefetch alone
constexpr size_t kChunk = size_t{1} << 20;

// Two lanes as one value: GCC and Clang use the vectors that every x86-64 and ARM64 has.
using Lanes __attribute__((vector_size(16))) = uint64_t;

void take_blocks(const uint8_t* p, size_t n_blocks, uint64_t* lanes) {
  Lanes h[kLanes / 2], d[kLanes / 2];  // x, then y
  std::memcpy(h, lanes, sizeof h);
  for (size_t b = 0; b < n_blocks; ++b, p += kBlock) {
    __builtin_prefetch(p + kAhead);
    __builtin_prefetch(p + kAhead + 64);
    std::memcpy(d, p, sizeof d);
    for (int i = 0; i < kLanes / 4; ++i) {
      Lanes &x = h[i], &y = h[i + kLanes / 4];
      x = ((x >> 8 | x << 56) + y) ^ d[i];
      y = ((y << 3 | y >> 61) ^ x) + d[i + kLanes / 4];
    }
  }
  std::memcpy(lanes, h, sizeof h);
}

// Stafford's finalizer (splitmix64): every bit of x reaches every bit of the result.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

uint64_t sum_run(std::span<const uint8_t> bytes) {
  uint64_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = mix(static_cast<uint64_t>(i) + 1);
  const size_t n_blocks = bytes.size() / kBlock, rest = bytes.size() % kBlock;
  take_blocks(bytes.data(), n_blocks, lanes);
  if (rest > 0) {
    uint8_t last[kBlock] = {};
    std::memcpy(last, bytes.data() + n_blocks * kBlock, rest);
    take_blocks(last, 1, lanes);
  }
  uint64_t sum = mix(bytes.size());
  for (uint64_t h : lanes) sum = mix(sum ^ h);
  return sum;
}

size_t count_chunks(size_t size) { return (size + kChunk - 1) / kChunk; }

uint64_t sum_chunk(std::span<const uint8_t> bytes, size_t i) {
  return sum_run(bytes.subspan(i * kChunk, std::min(kChunk, bytes.size() - i * kChunk)));
}

uint64_t sum_sums(std::span<const uint64_t> sums, size_t size) {
  const auto* p = reinterpret_cast<const uint8_t*>(sums.data());
  return mix(size ^ sum_run({p, sums.size_bytes()}));
}

}  // namespace

uint64_t checksum(std::span<const uint8_t> bytes) {
  std::vector<uint64_t> sums(count_chunks(bytes.size()));
  for (size_t i = 0; i < sums.size(); ++i) sums[i] = sum_chunk(bytes, i);
  return sum_sums(sums, bytes.size());
}

std::vector<uint64_t> checksums(std::span<const std::span<const uint8_t>> parts, ThreadPool& pool) {
  struct Chunk {
    size_t part, index;
  };
  std::vector<Chunk> chunks;
  std::vector<size_t> first;
  for (size_t i = 0; i < parts.size(); ++i) {
    first.push_back(chunks.size());
    for (size_t j = 0; j < count_chunks(parts[i].size()); ++j) chunks.push_back({i, j});
  }
  first.push_back(chunks.size());
  std::vector<uint64_t> sums(chunks.size());
  pool.run(static_cast<int64_t>(chunks.size()),
           [&](int64_t i, int) { sums[i] = sum_chunk(parts[chunks[i].part], chunks[i].index); });
  std::vector<uint64_t> found;
  for (size_t i = 0; i < parts.size(); ++i) {
    found.push_back(
        sum_sums(std::span(sums).subspan(first[i], first[i + 1] - first[i]), parts[i].size()));
  }
  return found;
}

}  // namespace nearfar
