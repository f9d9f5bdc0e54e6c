#include "quant.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "half.h"

namespace nearfar {
namespace {

// Bytes of codes of 64 rows.
constexpr int64_t kI2Step = 256;           // 16 k
constexpr int64_t kQ4Group = 4 * 256;      // 32 k
constexpr int64_t kInt8Group = 8 * 256;    // 32 k
constexpr int64_t kInt8Group16 = 4 * 256;  // 16 k

constexpr int64_t kI2BlockBytes = 64 * 4 + 16 * kI2Step;             // 256 k
constexpr int64_t kQ4Bytes = 64 * 2 + kQ4Group;                      // 32 k
constexpr int64_t kQ4KBytes = 64 * 2 * 2 + 8 * (64 * 2 + kQ4Group);  // 256 k
constexpr int64_t kInt8Bytes = 64 * 2 + kInt8Group;                  // 32 k
constexpr int64_t kInt8KBytes = 64 * 2 + 16 * (64 + kInt8Group16);   // 256 k

int64_t bytes_per_panel(PanelKind kind, int64_t cols) {
  switch (kind) {
    case PanelKind::kF32:
      return cols * 64 * 4;
    case PanelKind::kF16:
    case PanelKind::kBF16:
      return cols * 64 * 2;
    case PanelKind::kI2:
      return cols / 16 * kI2Step;
    case PanelKind::kI2Blocks:
      return cols / 256 * kI2BlockBytes;
    case PanelKind::kQ4:
      return cols / 32 * kQ4Bytes;
    case PanelKind::kQ4K:
      return cols / 256 * kQ4KBytes;
    case PanelKind::kInt8:
      return cols / 32 * kInt8Bytes;
    case PanelKind::kInt8K:
      return cols / 256 * kInt8KBytes;
  }
  return 0;
}

uint32_t load_u32(const void* p) {
  uint32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

template <class T>
T load(const uint8_t* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
void store(uint8_t* p, T v) {
  std::memcpy(p, &v, sizeof v);
}

// Row `row` of a panel takes lane `row` of each step: 4 bytes at step * 256 + row * 4.

// 16 codes of 0..3 a step. Four neighbouring codes travel as one word: no shift leaves its byte.
void put_i2(uint8_t* steps, int64_t row, const uint8_t* code, int64_t k) {
  for (int64_t s = 0; s < k / 16; ++s, code += 16) {
    const uint32_t word = load_u32(code) | load_u32(code + 4) << 2 | load_u32(code + 8) << 4 |
                          load_u32(code + 12) << 6;
    store(steps + s * 256 + row * 4, word);
  }
}

// 32 codes of 0..15.
void put_q4(uint8_t* steps, int64_t row, const uint8_t* code) {
  for (int64_t s = 0; s < 4; ++s, code += 8) {
    store(steps + s * 256 + row * 4, load_u32(code) | load_u32(code + 4) << 4);
  }
}

// k signed codes; flipping the top bit adds 128.
void put_int8(uint8_t* steps, int64_t row, const int8_t* code, int64_t k) {
  for (int64_t s = 0; s < k / 4; ++s, code += 4) {
    store(steps + s * 256 + row * 4, load_u32(code) ^ 0x80808080u);
  }
}

void get_i2(const uint8_t* steps, int64_t row, int k, float scale, float* out) {
  for (int i = 0; i < k; ++i) {
    const int code = (steps[i / 16 * 256 + row * 4 + i % 4] >> (i % 16 / 4 * 2)) & 3;
    out[i] = scale * static_cast<float>(code - 1);
  }
}

int get_q4(const uint8_t* steps, int64_t row, int i) {
  return (steps[i / 8 * 256 + row * 4 + i % 4] >> (i % 8 / 4 * 4)) & 15;
}

int get_int8(const uint8_t* steps, int64_t row, int i) {
  return steps[i / 4 * 256 + row * 4 + i % 4] - 128;
}

void require_finite(float scale, const RawTensor& w, int64_t row) {
  if (!std::isfinite(scale)) {
    throw std::invalid_argument(std::string(type_name(w.type)) + " tensor: row " +
                                std::to_string(row) + " has a scale that is not finite");
  }
}

void require_finite(uint16_t scale, const RawTensor& w, int64_t row) {
  require_finite(f16_to_f32(scale), w, row);
}

PackedMat allocate(const RawTensor& w, PanelKind kind, float scale) {
  PackedMat m;
  m.kind = kind;
  m.rows = w.rows;
  m.cols = w.cols;
  m.scale = scale;
  m.panel_bytes = bytes_per_panel(kind, w.cols);
  m.data = AlignedBuffer(static_cast<size_t>(m.n_panels() * m.panel_bytes));
  std::memset(m.data.data() + (m.n_panels() - 1) * m.panel_bytes, 0, m.panel_bytes);
  return m;
}

uint8_t* panel_of(PackedMat& m, int64_t row) {
  return m.data.data() + row / kPanelRows * m.panel_bytes;
}

// 64 k of 64 rows at a time: every cache line of the panel is filled while it is near.
template <class Value>
PackedMat pack_float(const RawTensor& w, PanelKind kind, float scale) {
  constexpr int64_t kRun = 64;
  PackedMat m = allocate(w, kind, scale);
  for (int64_t first = 0; first < w.rows; first += kPanelRows) {
    const int64_t rows = std::min(kPanelRows, w.rows - first);
    for (int64_t k0 = 0; k0 < w.cols; k0 += kRun) {
      const int64_t run = std::min(kRun, w.cols - k0);
      uint8_t* out = panel_of(m, first) + k0 * kPanelRows * sizeof(Value);
      for (int64_t row = 0; row < rows; ++row, out += sizeof(Value)) {
        const uint8_t* in = w.bytes.data() + ((first + row) * w.cols + k0) * sizeof(Value);
        for (int64_t k = 0; k < run; ++k) {
          store(out + k * kPanelRows * sizeof(Value), load<Value>(in + k * sizeof(Value)));
        }
      }
    }
  }
  return m;
}

// A block that is zero throughout says nothing about its row's scale: writers store d = 0 there,
// and a reader may find any d. All its codes become 1 (weight 0) and its d 0.
void settle_zero(TernaryBlock& b) {
  uint8_t any = 0;
  for (uint8_t code : b.code) any |= code ^ 1;
  if (any != 0 && b.d != 0) return;
  std::memset(b.code, 1, sizeof b.code);
  b.d = 0;
}

// The i32 sums of the i2 kernels hold 352,000 columns.
constexpr int64_t kMaxTernaryColumns = 1 << 18;

PackedMat pack_ternary(const RawTensor& w, float scale) {
  if (w.cols > kMaxTernaryColumns) {
    throw std::invalid_argument("ternary tensor with " + std::to_string(w.cols) +
                                " columns: the kernels sum at most " +
                                std::to_string(kMaxTernaryColumns));
  }
  const int64_t n_blocks = w.cols / kSuper;
  const int64_t block_bytes = block_shape(w.type).bytes;
  std::vector<float> d(static_cast<size_t>(w.rows * n_blocks));
  std::vector<float> row_scale(static_cast<size_t>(w.rows), 0.0f);
  bool one_scale_a_row = true;
  TernaryBlock b;
  for (int64_t i = 0; i < w.rows * n_blocks; ++i) {
    const int64_t n = i / n_blocks;
    decode_ternary(w.type, w.bytes.data() + i * block_bytes, b);
    require_finite(b.d, w, n);
    settle_zero(b);
    d[i] = b.d;
    if (b.d == 0) continue;
    if (row_scale[n] == 0) row_scale[n] = b.d;
    one_scale_a_row = one_scale_a_row && row_scale[n] == b.d;
  }

  PackedMat m = allocate(w, one_scale_a_row ? PanelKind::kI2 : PanelKind::kI2Blocks, scale);
  if (one_scale_a_row) {
    row_scale.resize(static_cast<size_t>(m.n_panels() * kPanelRows), 0.0f);
    m.row_scales = AlignedBuffer(row_scale.size() * sizeof(float));
    std::memcpy(m.row_scales.data(), row_scale.data(), m.row_scales.size());
  }
  for (int64_t i = 0; i < w.rows * n_blocks; ++i) {
    const int64_t n = i / n_blocks, j = i % n_blocks, row = n % kPanelRows;
    decode_ternary(w.type, w.bytes.data() + i * block_bytes, b);
    settle_zero(b);
    if (one_scale_a_row) {
      put_i2(panel_of(m, n) + j * 16 * kI2Step, row, b.code, kSuper);
    } else {
      uint8_t* out = panel_of(m, n) + j * kI2BlockBytes;
      store(out + row * 4, d[i]);
      put_i2(out + 64 * 4, row, b.code, kSuper);
    }
  }
  return m;
}

PackedMat pack_q4_0(const RawTensor& w, float scale) {
  PackedMat m = allocate(w, PanelKind::kQ4, scale);
  const uint8_t* in = w.bytes.data();
  Q4Block b;
  for (int64_t n = 0; n < w.rows; ++n) {
    uint8_t* out = panel_of(m, n);
    const int64_t row = n % kPanelRows;
    for (int64_t j = 0; j < w.cols / kGroup; ++j, in += 18, out += kQ4Bytes) {
      decode_q4_0(in, b);
      require_finite(b.d, w, n);
      store(out + row * 2, b.d);
      put_q4(out + 128, row, b.code);
    }
  }
  return m;
}

PackedMat pack_q8_0(const RawTensor& w, float scale) {
  PackedMat m = allocate(w, PanelKind::kInt8, scale);
  const uint8_t* in = w.bytes.data();
  Q8Block b;
  for (int64_t n = 0; n < w.rows; ++n) {
    uint8_t* out = panel_of(m, n);
    const int64_t row = n % kPanelRows;
    for (int64_t j = 0; j < w.cols / kGroup; ++j, in += 34, out += kInt8Bytes) {
      decode_q8_0(in, b);
      require_finite(b.d, w, n);
      store(out + row * 2, b.d);
      put_int8(out + 128, row, b.code, kGroup);
    }
  }
  return m;
}

PackedMat pack_q4_k(const RawTensor& w, float scale) {
  PackedMat m = allocate(w, PanelKind::kQ4K, scale);
  const uint8_t* in = w.bytes.data();
  Q4KBlock b;
  for (int64_t n = 0; n < w.rows; ++n) {
    uint8_t* out = panel_of(m, n);
    const int64_t row = n % kPanelRows;
    for (int64_t j = 0; j < w.cols / kSuper; ++j, in += 144, out += kQ4KBytes) {
      decode_q4_k(in, b);
      require_finite(b.d, w, n);
      require_finite(b.dmin, w, n);
      store(out + row * 2, b.d);
      store(out + 128 + row * 2, b.dmin);
      for (int g = 0; g < 8; ++g) {
        uint8_t* group = out + 256 + g * (128 + kQ4Group);
        group[row] = b.scale[g];
        group[64 + row] = b.min[g];
        put_q4(group + 128, row, b.code + g * 32);
      }
    }
  }
  return m;
}

PackedMat pack_q6_k(const RawTensor& w, float scale) {
  PackedMat m = allocate(w, PanelKind::kInt8K, scale);
  const uint8_t* in = w.bytes.data();
  Q6KBlock b;
  for (int64_t n = 0; n < w.rows; ++n) {
    uint8_t* out = panel_of(m, n);
    const int64_t row = n % kPanelRows;
    for (int64_t j = 0; j < w.cols / kSuper; ++j, in += 210, out += kInt8KBytes) {
      decode_q6_k(in, b);
      require_finite(b.d, w, n);
      store(out + row * 2, b.d);
      for (int g = 0; g < 16; ++g) {
        uint8_t* group = out + 128 + g * (64 + kInt8Group16);
        store(group + row, b.scale[g]);
        put_int8(group + 64, row, b.code + g * 16, 16);
      }
    }
  }
  return m;
}

}  // namespace

int grain(PanelKind kind) {
  switch (kind) {
    case PanelKind::kF32:
    case PanelKind::kF16:
    case PanelKind::kBF16:
      return kGrainFloat;
    case PanelKind::kI2:
    case PanelKind::kI2Blocks:
      return kGrainRow;
    case PanelKind::kQ4:
    case PanelKind::kInt8:
      return 32;
    case PanelKind::kQ4K:
    case PanelKind::kInt8K:
      return 256;
  }
  return kGrainFloat;
}

std::string_view kind_name(PanelKind kind) {
  switch (kind) {
    case PanelKind::kF32:
      return "f32";
    case PanelKind::kF16:
      return "f16";
    case PanelKind::kBF16:
      return "bf16";
    case PanelKind::kI2:
      return "i2";
    case PanelKind::kI2Blocks:
      return "i2_blocks";
    case PanelKind::kQ4:
      return "q4";
    case PanelKind::kQ4K:
      return "q4_k";
    case PanelKind::kInt8:
      return "int8";
    case PanelKind::kInt8K:
      return "int8_k";
  }
  return "?";
}

int PackedMat::grain() const { return nearfar::grain(kind); }

Panels PackedMat::view() const {
  return {kind,        rows,        cols,
          panel_bytes, data.data(), reinterpret_cast<const float*>(row_scales.data()),
          scale};
}

PackedMat pack(const RawTensor& w, float scale) {
  require_whole(w);
  if (!std::isfinite(scale)) throw std::invalid_argument("the scale of a matrix is not finite");
  switch (w.type) {
    case TensorType::kF32:
      return pack_float<uint32_t>(w, PanelKind::kF32, scale);
    case TensorType::kF16:
      return pack_float<uint16_t>(w, PanelKind::kF16, scale);
    case TensorType::kBF16:
      return pack_float<uint16_t>(w, PanelKind::kBF16, scale);
    case TensorType::kTQ1_0:
    case TensorType::kTQ2_0:
      return pack_ternary(w, scale);
    case TensorType::kQ4_0:
      return pack_q4_0(w, scale);
    case TensorType::kQ8_0:
      return pack_q8_0(w, scale);
    case TensorType::kQ4_K:
      return pack_q4_k(w, scale);
    case TensorType::kQ6_K:
      return pack_q6_k(w, scale);
  }
  throw std::invalid_argument("unreachable: block_shape names every type");
}

PackedMat packed_from(PanelKind kind, int64_t rows, int64_t cols, float scale, AlignedBuffer data,
                      AlignedBuffer row_scales) {
  const auto expect = [](bool fine, const char* what) {
    if (!fine) throw std::invalid_argument(std::string("a packed matrix: expected ") + what);
  };
  constexpr int64_t kMost = int64_t{1} << 40;  // rows * cols * 4 bytes stay within int64
  expect(static_cast<int>(kind) < kPanelKinds, "a known kind");
  expect(rows >= 1 && cols >= 1 && cols < kMost && rows < kMost / cols, "rows and columns");
  const int block = grain(kind) == kGrainFloat ? 1 : grain(kind) == 32 ? 32 : 256;
  expect(cols % block == 0, "rows of whole blocks");
  expect(grain(kind) != kGrainRow || cols <= kMaxTernaryColumns, "columns that an i32 can sum");
  expect(std::isfinite(scale), "a finite scale");
  PackedMat m;
  m.kind = kind;
  m.rows = rows;
  m.cols = cols;
  m.scale = scale;
  m.panel_bytes = bytes_per_panel(kind, cols);
  const bool has_row_scales = kind == PanelKind::kI2;
  expect(static_cast<int64_t>(data.size()) == m.n_panels() * m.panel_bytes, "whole panels");
  expect(static_cast<int64_t>(row_scales.size()) ==
             (has_row_scales ? m.n_panels() * kPanelRows * static_cast<int64_t>(sizeof(float)) : 0),
         "a scale for each row of its panels");
  m.data = std::move(data);
  m.row_scales = std::move(row_scales);
  return m;
}

void unpack_row(const PackedMat& w, int64_t row, std::span<float> out) {
  if (row < 0 || row >= w.rows || static_cast<int64_t>(out.size()) != w.cols) {
    throw std::invalid_argument("unpack_row: row or output size out of range");
  }
  const uint8_t* p = w.data.data() + row / kPanelRows * w.panel_bytes;
  const int64_t r = row % kPanelRows;
  float* y = out.data();
  for (int64_t k = 0; k < w.cols;) {
    switch (w.kind) {
      case PanelKind::kF32:
        y[k] = load<float>(p + (k * 64 + r) * 4);
        ++k;
        break;
      case PanelKind::kF16:
        y[k] = f16_to_f32(load<uint16_t>(p + (k * 64 + r) * 2));
        ++k;
        break;
      case PanelKind::kBF16:
        y[k] = bf16_to_f32(load<uint16_t>(p + (k * 64 + r) * 2));
        ++k;
        break;
      case PanelKind::kI2:
        get_i2(p, r, 16, w.view().row_scales[row], y + k);
        p += kI2Step, k += 16;
        break;
      case PanelKind::kI2Blocks:
        get_i2(p + 256, r, 256, load<float>(p + r * 4), y + k);
        p += kI2BlockBytes, k += 256;
        break;
      case PanelKind::kQ4: {
        const float d = f16_to_f32(load<uint16_t>(p + r * 2));
        for (int i = 0; i < 32; ++i) y[k + i] = d * static_cast<float>(get_q4(p + 128, r, i) - 8);
        p += kQ4Bytes, k += 32;
        break;
      }
      case PanelKind::kInt8: {
        const float d = f16_to_f32(load<uint16_t>(p + r * 2));
        for (int i = 0; i < 32; ++i) y[k + i] = d * static_cast<float>(get_int8(p + 128, r, i));
        p += kInt8Bytes, k += 32;
        break;
      }
      case PanelKind::kQ4K: {
        const float d = f16_to_f32(load<uint16_t>(p + r * 2));
        const float dmin = f16_to_f32(load<uint16_t>(p + 128 + r * 2));
        for (int i = 0; i < 256; ++i) {
          const uint8_t* group = p + 256 + i / 32 * (128 + kQ4Group);
          const float low = dmin * static_cast<float>(group[64 + r]);
          y[k + i] = d * static_cast<float>(group[r]) *
                         static_cast<float>(get_q4(group + 128, r, i % 32)) -
                     low;
        }
        p += kQ4KBytes, k += 256;
        break;
      }
      case PanelKind::kInt8K: {
        const float d = f16_to_f32(load<uint16_t>(p + r * 2));
        for (int i = 0; i < 256; ++i) {
          const uint8_t* group = p + 128 + i / 16 * (64 + kInt8Group16);
          y[k + i] = d * static_cast<float>(load<int8_t>(group + r)) *
                     static_cast<float>(get_int8(group + 64, r, i % 16));
        }
        p += kInt8KBytes, k += 256;
        break;
      }
    }
  }
}

}  // namespace nearfar
