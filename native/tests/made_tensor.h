// Random tensors of every file type, for tests: all bytes are random, scales are small and finite.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "blocks.h"
#include "half.h"
#include "quant.h"

namespace nearfar::tests {

inline constexpr TensorType kTypes[] = {
    TensorType::kF32,  TensorType::kF16,   TensorType::kBF16, TensorType::kQ4_0, TensorType::kQ4_1,
    TensorType::kQ8_0, TensorType::kQ2_K,  TensorType::kQ3_K, TensorType::kQ4_K, TensorType::kQ5_K,
    TensorType::kQ6_K, TensorType::kTQ1_0, TensorType::kTQ2_0};

struct MadeTensor {
  TensorType type;
  int64_t rows, cols;
  std::vector<uint8_t> bytes;

  RawTensor raw() const { return {type, rows, cols, bytes}; }
  std::string name() const {
    return std::string(type_name(type)) + " [" + std::to_string(rows) + ", " +
           std::to_string(cols) + "]";
  }
};

// Where the f16 scales of a block lie (dmin: m in Q4_1); -1: none.
struct ScaleOffsets {
  int d, dmin;
};
inline ScaleOffsets scale_offsets(TensorType type) {
  switch (type) {
    case TensorType::kQ4_0:
    case TensorType::kQ8_0:
      return {0, -1};
    case TensorType::kQ4_1:
    case TensorType::kQ4_K:
    case TensorType::kQ5_K:
      return {0, 2};
    case TensorType::kQ2_K:
      return {80, 82};
    case TensorType::kQ3_K:
      return {108, -1};
    case TensorType::kQ6_K:
      return {208, -1};
    case TensorType::kTQ1_0:
      return {52, -1};
    case TensorType::kTQ2_0:
      return {64, -1};
    default:
      return {-1, -1};
  }
}

inline void put_f16(uint8_t* p, float x) {
  const uint16_t h = f32_to_f16(x);
  std::memcpy(p, &h, 2);
}

// Every block gets the scales d and dmin.
inline void set_scales(MadeTensor& t, float d, float dmin) {
  const ScaleOffsets at = scale_offsets(t.type);
  const auto size = static_cast<size_t>(block_shape(t.type).bytes);
  for (size_t i = 0; i < t.bytes.size(); i += size) {
    if (at.d >= 0) put_f16(&t.bytes[i] + at.d, d);
    if (at.dmin >= 0) put_f16(&t.bytes[i] + at.dmin, dmin);
  }
}

// `one_scale_a_row` matters to the ternary types: it decides between the i2 and i2_blocks panels.
inline MadeTensor make_tensor(TensorType type, int64_t rows, int64_t cols, uint32_t seed,
                              bool one_scale_a_row = true) {
  std::mt19937 rng(seed);
  std::uniform_int_distribution<int> byte(0, 255);
  std::normal_distribution<float> normal(0.0f, 0.05f);
  MadeTensor t{type, rows, cols, std::vector<uint8_t>(rows * row_bytes(type, cols))};
  const auto size = static_cast<size_t>(block_shape(type).bytes);
  const ScaleOffsets at = scale_offsets(type);
  float d = 0;
  for (size_t i = 0; i < t.bytes.size(); i += size) {
    uint8_t* block = &t.bytes[i];
    if (at.d < 0) {
      const float x = normal(rng);
      const auto bits = std::bit_cast<uint32_t>(x);
      const auto bf16 = static_cast<uint16_t>(bits >> 16);
      if (type == TensorType::kF32) std::memcpy(block, &x, 4);
      if (type == TensorType::kF16) put_f16(block, x);
      if (type == TensorType::kBF16) std::memcpy(block, &bf16, 2);
      continue;
    }
    for (size_t j = 0; j < size; ++j) block[j] = static_cast<uint8_t>(byte(rng));
    const bool new_row = i % static_cast<size_t>(row_bytes(type, cols)) == 0;
    if (new_row || !one_scale_a_row) d = normal(rng);
    put_f16(block + at.d, d);
    if (at.dmin >= 0) put_f16(block + at.dmin, normal(rng));
  }
  return t;
}

// K of the tests: some blocks, and not only powers of two.
inline std::vector<int64_t> columns(TensorType type) {
  const int64_t block = block_shape(type).weights;
  if (block == 1) return {1, 3, 17, 64, 257, 1023};
  if (block == 32) return {32, 64, 96, 256, 1024, 1056};
  return {256, 512, 1024, 1280};
}

}  // namespace nearfar::tests
