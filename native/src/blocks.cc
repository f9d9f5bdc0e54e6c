#include "blocks.h"

#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>

#include "half.h"

static_assert(std::endian::native == std::endian::little,
              "panels and GGUF files are little-endian");

namespace nearfar {
namespace {

template <class T>
T load(const uint8_t* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// `bytes` bytes hold digits[i] = trit i of each: element = i * bytes + byte. Multiplying by 3
// modulo 256 moves the next trit to the top; times 3 / 256 reads it.
void decode_trits(const uint8_t* p, int bytes, int digits, uint8_t* code) {
  uint8_t power = 1;
  for (int i = 0; i < digits; ++i) {
    for (int j = 0; j < bytes; ++j) {
      const auto rest = static_cast<uint8_t>(p[j] * power);
      code[i * bytes + j] = static_cast<uint8_t>((rest * 3) >> 8);
    }
    power = static_cast<uint8_t>(power * 3);
  }
}

// 12 bytes hold 8 scales and 8 mins of 6 bits: s[j] and s[4 + j] carry scale j and min j below the
// top bits of scale 4 + j and min 4 + j, whose low nibbles share s[8 + j].
void decode_scales_and_mins(const uint8_t* s, uint8_t* scale, uint8_t* min) {
  for (int j = 0; j < 4; ++j) {
    scale[j] = s[j] & 63;
    min[j] = s[4 + j] & 63;
    scale[4 + j] = static_cast<uint8_t>((s[8 + j] & 15) | ((s[j] >> 2) & 0x30));
    min[4 + j] = static_cast<uint8_t>((s[8 + j] >> 4) | ((s[4 + j] >> 2) & 0x30));
  }
}

// 4 runs of 32 bytes: low nibbles are one group of 32, high nibbles the next.
void decode_nibble_runs(const uint8_t* nibbles, uint8_t* code) {
  for (int run = 0; run < 4; ++run) {
    for (int j = 0; j < 32; ++j) {
      code[run * 64 + j] = nibbles[run * 32 + j] & 15;
      code[run * 64 + 32 + j] = nibbles[run * 32 + j] >> 4;
    }
  }
}

// 64 bytes of 2-bit codes: two halves of 32 bytes; element = half * 128 + field * 32 + byte.
void decode_pairs(const uint8_t* p, uint8_t* code) {
  for (int half = 0; half < 2; ++half) {
    for (int field = 0; field < 4; ++field) {
      for (int j = 0; j < 32; ++j) {
        code[half * 128 + field * 32 + j] = (p[half * 32 + j] >> (2 * field)) & 3;
      }
    }
  }
}

// y[kSuper] = d * scale * code - dmin * min of a block whose groups have both.
template <class Block>
void scale_and_shift(const Block& b, float* y) {
  constexpr int64_t kRun = kSuper / static_cast<int64_t>(sizeof b.scale);
  const float d = f16_to_f32(b.d), dmin = f16_to_f32(b.dmin);
  for (int i = 0; i < kSuper; ++i) {
    const float low = dmin * static_cast<float>(b.min[i / kRun]);
    y[i] = d * static_cast<float>(b.scale[i / kRun]) * static_cast<float>(b.code[i]) - low;
  }
}

}  // namespace

BlockShape block_shape(TensorType type) {
  switch (type) {
    case TensorType::kF32:
      return {1, 4};
    case TensorType::kF16:
      return {1, 2};
    case TensorType::kBF16:
      return {1, 2};
    case TensorType::kQ4_0:
      return {32, 18};
    case TensorType::kQ4_1:
      return {32, 20};
    case TensorType::kQ8_0:
      return {32, 34};
    case TensorType::kQ2_K:
      return {256, 84};
    case TensorType::kQ3_K:
      return {256, 110};
    case TensorType::kQ4_K:
      return {256, 144};
    case TensorType::kQ5_K:
      return {256, 176};
    case TensorType::kQ6_K:
      return {256, 210};
    case TensorType::kTQ1_0:
      return {256, 54};
    case TensorType::kTQ2_0:
      return {256, 66};
  }
  throw std::invalid_argument("tensor type " + std::to_string(static_cast<uint32_t>(type)) +
                              " is not one that the native engine reads: F32 F16 BF16 Q4_0 Q4_1 "
                              "Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K TQ1_0 TQ2_0");
}

std::string_view type_name(TensorType type) {
  switch (type) {
    case TensorType::kF32:
      return "F32";
    case TensorType::kF16:
      return "F16";
    case TensorType::kBF16:
      return "BF16";
    case TensorType::kQ4_0:
      return "Q4_0";
    case TensorType::kQ4_1:
      return "Q4_1";
    case TensorType::kQ8_0:
      return "Q8_0";
    case TensorType::kQ2_K:
      return "Q2_K";
    case TensorType::kQ3_K:
      return "Q3_K";
    case TensorType::kQ4_K:
      return "Q4_K";
    case TensorType::kQ5_K:
      return "Q5_K";
    case TensorType::kQ6_K:
      return "Q6_K";
    case TensorType::kTQ1_0:
      return "TQ1_0";
    case TensorType::kTQ2_0:
      return "TQ2_0";
  }
  return "?";
}

// 32 bytes of 5 trits, 16 bytes of 5, 4 bytes of 4, then f16 d.
void decode_tq1_0(const uint8_t* block, TernaryBlock& out) {
  decode_trits(block, 32, 5, out.code);
  decode_trits(block + 32, 16, 5, out.code + 160);
  decode_trits(block + 48, 4, 4, out.code + 240);
  out.d = f16_to_f32(load<uint16_t>(block + 52));
}

// 64 bytes of codes, f16 d.
void decode_tq2_0(const uint8_t* block, TernaryBlock& out) {
  decode_pairs(block, out.code);
  out.d = f16_to_f32(load<uint16_t>(block + 64));
}

// f16 d, then 16 bytes: low nibbles are elements 0..15, high nibbles 16..31.
void decode_q4_0(const uint8_t* block, Q4Block& out) {
  out.d = load<uint16_t>(block);
  for (int j = 0; j < 16; ++j) {
    out.code[j] = block[2 + j] & 15;
    out.code[16 + j] = block[2 + j] >> 4;
  }
}

// f16 d, f16 m, then nibbles as Q4_0.
void decode_q4_1(const uint8_t* block, Q41Block& out) {
  out.d = load<uint16_t>(block);
  out.m = load<uint16_t>(block + 2);
  for (int j = 0; j < 16; ++j) {
    out.code[j] = block[4 + j] & 15;
    out.code[16 + j] = block[4 + j] >> 4;
  }
}

// f16 d, then 32 signed bytes.
void decode_q8_0(const uint8_t* block, Q8Block& out) {
  out.d = load<uint16_t>(block);
  std::memcpy(out.code, block + 2, 32);
}

// 16 bytes scale | min << 4, 64 bytes of 2-bit codes, f16 d, f16 dmin.
void decode_q2_k(const uint8_t* block, Q2KBlock& out) {
  for (int j = 0; j < 16; ++j) {
    out.scale[j] = block[j] & 15;
    out.min[j] = block[j] >> 4;
  }
  decode_pairs(block + 16, out.code);
  out.d = load<uint16_t>(block + 80);
  out.dmin = load<uint16_t>(block + 82);
}

// 32 bytes of top bits (bit j of byte i: element 32 j + i), 64 bytes of low 2 bits, 12 bytes of
// 6-bit scales + 32 (8 bytes of low nibbles, all low halves first; 4 bytes of top bits, field by
// field), f16 d.
void decode_q3_k(const uint8_t* block, Q3KBlock& out) {
  decode_pairs(block + 32, out.code);
  for (int i = 0; i < kSuper; ++i) out.code[i] |= ((block[i % 32] >> (i / 32)) & 1) << 2;
  const uint8_t* s = block + 96;
  for (int j = 0; j < 16; ++j) {
    const int low = (s[j % 8] >> (j / 8 * 4)) & 15;
    const int top = (s[8 + j % 4] >> (j / 4 * 2)) & 3;
    out.scale[j] = static_cast<int8_t>((low | top << 4) - 32);
  }
  out.d = load<uint16_t>(block + 108);
}

// f16 d, f16 dmin, 12 bytes of 6-bit scales and mins, 128 bytes of nibbles.
void decode_q4_k(const uint8_t* block, Q4KBlock& out) {
  out.d = load<uint16_t>(block);
  out.dmin = load<uint16_t>(block + 2);
  decode_scales_and_mins(block + 4, out.scale, out.min);
  decode_nibble_runs(block + 16, out.code);
}

// f16 d, f16 dmin, 12 bytes of 6-bit scales and mins, 32 bytes of top bits (as Q3_K), 128 bytes of
// nibbles.
void decode_q5_k(const uint8_t* block, Q5KBlock& out) {
  out.d = load<uint16_t>(block);
  out.dmin = load<uint16_t>(block + 2);
  decode_scales_and_mins(block + 4, out.scale, out.min);
  decode_nibble_runs(block + 48, out.code);
  for (int i = 0; i < kSuper; ++i) out.code[i] |= ((block[16 + i % 32] >> (i / 32)) & 1) << 4;
}

// 128 bytes of low nibbles, 64 bytes of top 2 bits, 16 int8 scales, f16 d. Per half of 128 weights
// the nibble runs are low(0..63), high(0..63) and the top bits four fields of 32.
void decode_q6_k(const uint8_t* block, Q6KBlock& out) {
  for (int half = 0; half < 2; ++half) {
    for (int field = 0; field < 4; ++field) {
      const uint8_t* low = block + half * 64 + field % 2 * 32;
      const uint8_t* top = block + 128 + half * 32;
      int8_t* code = out.code + half * 128 + field * 32;
      for (int j = 0; j < 32; ++j) {
        const int nibble = (low[j] >> (field / 2 * 4)) & 15;
        const int bits = (top[j] >> (2 * field)) & 3;
        code[j] = static_cast<int8_t>((nibble | bits << 4) - 32);
      }
    }
  }
  std::memcpy(out.scale, block + 192, 16);
  out.d = load<uint16_t>(block + 208);
}

void decode_ternary(TensorType type, const uint8_t* block, TernaryBlock& out) {
  if (type == TensorType::kTQ1_0) {
    decode_tq1_0(block, out);
  } else {
    decode_tq2_0(block, out);
  }
}

int64_t row_bytes(TensorType type, int64_t cols) {
  const BlockShape block = block_shape(type);
  if (cols <= 0 || cols % block.weights != 0 || cols > INT64_MAX / 256) {
    throw std::invalid_argument(std::string(type_name(type)) + " tensor with rows of " +
                                std::to_string(cols) + ": expected a multiple of " +
                                std::to_string(block.weights));
  }
  return cols / block.weights * block.bytes;
}

void require_whole(const RawTensor& w) {
  const int64_t stride = row_bytes(w.type, w.cols);
  if (w.rows <= 0 || static_cast<int64_t>(w.bytes.size()) / w.rows != stride ||
      static_cast<int64_t>(w.bytes.size()) % w.rows != 0) {
    throw std::invalid_argument(std::string(type_name(w.type)) + " tensor [" +
                                std::to_string(w.rows) + ", " + std::to_string(w.cols) +
                                "]: expected " + std::to_string(stride) + " bytes a row, found " +
                                std::to_string(w.bytes.size()) + " bytes in all");
  }
}

void dequantize_row(const RawTensor& w, int64_t row, std::span<float> out) {
  require_whole(w);
  if (row < 0 || row >= w.rows || static_cast<int64_t>(out.size()) != w.cols) {
    throw std::invalid_argument("row " + std::to_string(row) + " into " +
                                std::to_string(out.size()) + " floats: the tensor is [" +
                                std::to_string(w.rows) + ", " + std::to_string(w.cols) + "]");
  }
  const BlockShape block = block_shape(w.type);
  const uint8_t* in = w.bytes.data() + row * row_bytes(w.type, w.cols);
  float* y = out.data();
  for (int64_t j = 0; j < w.cols / block.weights; ++j, in += block.bytes, y += block.weights) {
    switch (w.type) {
      case TensorType::kF32:
        *y = load<float>(in);
        break;
      case TensorType::kF16:
        *y = f16_to_f32(load<uint16_t>(in));
        break;
      case TensorType::kBF16:
        *y = bf16_to_f32(load<uint16_t>(in));
        break;
      case TensorType::kTQ1_0:
      case TensorType::kTQ2_0: {
        TernaryBlock b;
        decode_ternary(w.type, in, b);
        for (int i = 0; i < kSuper; ++i) y[i] = b.d * static_cast<float>(b.code[i] - 1);
        break;
      }
      case TensorType::kQ4_0: {
        Q4Block b;
        decode_q4_0(in, b);
        const float d = f16_to_f32(b.d);
        for (int i = 0; i < kGroup; ++i) y[i] = d * static_cast<float>(b.code[i] - 8);
        break;
      }
      case TensorType::kQ4_1: {
        Q41Block b;
        decode_q4_1(in, b);
        const float d = f16_to_f32(b.d), m = f16_to_f32(b.m);
        for (int i = 0; i < kGroup; ++i) y[i] = d * static_cast<float>(b.code[i]) + m;
        break;
      }
      case TensorType::kQ8_0: {
        Q8Block b;
        decode_q8_0(in, b);
        const float d = f16_to_f32(b.d);
        for (int i = 0; i < kGroup; ++i) y[i] = d * static_cast<float>(b.code[i]);
        break;
      }
      case TensorType::kQ2_K: {
        Q2KBlock b;
        decode_q2_k(in, b);
        scale_and_shift(b, y);
        break;
      }
      case TensorType::kQ3_K: {
        Q3KBlock b;
        decode_q3_k(in, b);
        const float d = f16_to_f32(b.d);
        for (int i = 0; i < kSuper; ++i) {
          y[i] = d * static_cast<float>(b.scale[i / 16]) * static_cast<float>(b.code[i] - 4);
        }
        break;
      }
      case TensorType::kQ4_K: {
        Q4KBlock b;
        decode_q4_k(in, b);
        scale_and_shift(b, y);
        break;
      }
      case TensorType::kQ5_K: {
        Q5KBlock b;
        decode_q5_k(in, b);
        scale_and_shift(b, y);
        break;
      }
      case TensorType::kQ6_K: {
        Q6KBlock b;
        decode_q6_k(in, b);
        const float d = f16_to_f32(b.d);
        for (int i = 0; i < kSuper; ++i) {
          y[i] = d * static_cast<float>(b.scale[i / 16]) * static_cast<float>(b.code[i]);
        }
        break;
      }
    }
  }
}

}  // namespace nearfar
