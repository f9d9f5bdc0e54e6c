// The tensors of a GGUF file: blocks decoded to integer codes and scales, rows to floats. The only
// place that knows how their bits lie. Layouts are those of ggml (ggml-common.h); the `gguf`
// package is the oracle in tests.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "mat.h"

namespace nearfar {

constexpr int64_t kSuper = 256;  // weights of a TQ or K-quant block
constexpr int64_t kGroup = 32;   // weights of a Q4_0, Q4_1 or Q8_0 block

// A tensor as it lies in the file, row-major. A vector has rows = 1.
struct RawTensor {
  TensorType type;
  int64_t rows, cols;
  std::span<const uint8_t> bytes;
};

struct BlockShape {
  int64_t weights, bytes;
};

// Throws std::invalid_argument for a number that is none of TensorType.
BlockShape block_shape(TensorType type);
std::string_view type_name(TensorType type);

// Bytes of one row; throws std::invalid_argument unless cols > 0 is a multiple of the type's block.
int64_t row_bytes(TensorType type, int64_t cols);

// Throws std::invalid_argument unless w has rows and exactly their bytes.
void require_whole(const RawTensor& w);

// The scalar truth: out[cols] = row `row`, bit-equal with gguf.quants.dequantize. Serves embeddings
// and vectors too. Throws std::invalid_argument on sizes or a row out of range.
void dequantize_row(const RawTensor& w, int64_t row, std::span<float> out);

// value = d * (code - 1). TQ1_0 gives codes 0..2; in TQ2_0 code 3 is possible and means +2.
struct TernaryBlock {
  uint8_t code[kSuper];
  float d;
};
void decode_tq1_0(const uint8_t* block, TernaryBlock& out);
void decode_tq2_0(const uint8_t* block, TernaryBlock& out);
void decode_ternary(TensorType type, const uint8_t* block, TernaryBlock& out);  // either

// value = d * (code - 8), code 0..15
struct Q4Block {
  uint8_t code[kGroup];
  uint16_t d;  // f16 bits
};
void decode_q4_0(const uint8_t* block, Q4Block& out);

// value = d * code + m, code 0..15
struct Q41Block {
  uint8_t code[kGroup];
  uint16_t d, m;  // f16 bits
};
void decode_q4_1(const uint8_t* block, Q41Block& out);

// value = d * code
struct Q8Block {
  int8_t code[kGroup];
  uint16_t d;
};
void decode_q8_0(const uint8_t* block, Q8Block& out);

// value = d * scale[j] * code - dmin * min[j], j = k / 16, code 0..3, scale and min 0..15
struct Q2KBlock {
  uint8_t code[kSuper];
  uint8_t scale[kSuper / 16], min[kSuper / 16];
  uint16_t d, dmin;
};
void decode_q2_k(const uint8_t* block, Q2KBlock& out);

// value = d * scale[j] * (code - 4), j = k / 16, code 0..7, scale -32..31
struct Q3KBlock {
  uint8_t code[kSuper];
  int8_t scale[kSuper / 16];
  uint16_t d;
};
void decode_q3_k(const uint8_t* block, Q3KBlock& out);

// value = d * scale[j] * code - dmin * min[j], j = k / 32, code 0..15, scale and min 0..63
struct Q4KBlock {
  uint8_t code[kSuper];
  uint8_t scale[kSuper / 32], min[kSuper / 32];
  uint16_t d, dmin;
};
void decode_q4_k(const uint8_t* block, Q4KBlock& out);

using Q5KBlock = Q4KBlock;  // code 0..31
void decode_q5_k(const uint8_t* block, Q5KBlock& out);

// value = d * scale[j] * code, j = k / 16, code -32..31
struct Q6KBlock {
  int8_t code[kSuper];
  int8_t scale[kSuper / 16];
  uint16_t d;
};
void decode_q6_k(const uint8_t* block, Q6KBlock& out);

}  // namespace nearfar
