// The quantised blocks of a GGUF file, decoded to integer codes and scales: the only place that
// knows how their bits lie. Layouts are those of ggml (ggml-common.h); the `gguf` package is the
// oracle in tests.
#pragma once

#include <cstdint>
#include <string_view>

#include "mat.h"

namespace nearfar {

constexpr int64_t kSuper = 256;  // weights of a TQ or K-quant block
constexpr int64_t kGroup = 32;   // weights of a Q4_0 or Q8_0 block

struct BlockShape {
  int64_t weights, bytes;
};

// Throws std::invalid_argument for a number that is none of TensorType.
BlockShape block_shape(TensorType type);
std::string_view type_name(TensorType type);

// value = d * (code - 1). TQ1_0 gives codes 0..2; in TQ2_0 code 3 is possible and means +2.
struct TernaryBlock {
  uint8_t code[kSuper];
  float d;
};
void decode_tq1_0(const uint8_t* block, TernaryBlock& out);
void decode_tq2_0(const uint8_t* block, TernaryBlock& out);

// value = d * (code - 8), code 0..15
struct Q4Block {
  uint8_t code[kGroup];
  uint16_t d;  // f16 bits
};
void decode_q4_0(const uint8_t* block, Q4Block& out);

// value = d * code
struct Q8Block {
  int8_t code[kGroup];
  uint16_t d;
};
void decode_q8_0(const uint8_t* block, Q8Block& out);

// value = d * scale[j] * code - dmin * min[j], j = k / 32, code 0..15, scale and min 0..63
struct Q4KBlock {
  uint8_t code[kSuper];
  uint8_t scale[kSuper / 32], min[kSuper / 32];
  uint16_t d, dmin;
};
void decode_q4_k(const uint8_t* block, Q4KBlock& out);

// value = d * scale[j] * code, j = k / 16, code -32..31
struct Q6KBlock {
  int8_t code[kSuper];
  int8_t scale[kSuper / 16];
  uint16_t d;
};
void decode_q6_k(const uint8_t* block, Q6KBlock& out);

}  // namespace nearfar
