#include "quant.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "half.h"
#include "read_panel.h"

namespace nearfar {
namespace {

int64_t bytes_per_panel(PanelKind kind, int64_t cols) {
  const Form& f = form(kind);
  if (kind == PanelKind::kBF16Dot) return (cols + 31) / 32 * 32 * 64 * 2;
  if (kind == PanelKind::kW8) return (cols + 63) / 64 * 64 * 64;
  if (f.scheme == Scheme::kFloat) return cols * 64 * (kind == PanelKind::kF32 ? 4 : 2);
  if (kind == PanelKind::kL3) return kLutHead + lut_units(cols) * kLutUnitBytes;
  if (kind == PanelKind::kT5) return (cols + kT5StepColumns - 1) / kT5StepColumns * kStepBytes;
  return cols / f.block * block_bytes(f);
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

// A row of one block on its way into a panel: codes as the panel holds them, and its scales.
struct Block {
  uint8_t code[kSuper];
  uint8_t scale[kSuper / 16], min[kSuper / 16];  // Scheme::kSuper, one per group; bits of an int8
  uint32_t d, dmin;  // bits of the scales in the head: f16, or f32 for Scheme::kBlocks
};

// Row `row` of a panel takes lane `row` of each step: 4 bytes at step * 256 + row * 4. Four
// neighbouring codes travel as one word; masked, no shift leaves its byte.
uint8_t* put_plane(uint8_t* out, int64_t row, const uint8_t* code, int64_t k, int shift, int bits) {
  const uint32_t mask = ((1u << bits) - 1) * 0x01010101u;
  for (const uint8_t* end = code + k; code < end; out += kStepBytes) {
    uint32_t word = 0;
    for (int f = 0; f < 8; f += bits, code += 4) word |= (load_u32(code) >> shift & mask) << f;
    store(out + row * 4, word);
  }
  return out;
}

void put_block(const Form& f, uint8_t* out, int64_t row, const Block& b) {
  if (f.head == 256 && !f.has_min) {
    store(out + row * 4, b.d);
  } else if (f.head > 0) {
    store(out + row * 2, static_cast<uint16_t>(b.d));
    if (f.has_min) store(out + 128 + row * 2, static_cast<uint16_t>(b.dmin));
  }
  out += f.head;
  for (int k = 0; k < f.block; k += f.unit) {
    const int g = k / f.group;
    if (f.side == 64) {
      out[row] = static_cast<uint8_t>(b.scale[g] | b.min[g] << 4);
    } else if (f.side == 128) {
      out[row] = b.scale[g];
      out[64 + row] = f.has_min ? b.min[g] : b.scale[g + 1];
    }
    out = put_plane(out + f.side, row, b.code + k, f.unit, 0, f.low);
    if (f.high > 0) out = put_plane(out, row, b.code + k, f.unit, f.low, f.high);
  }
}

// Trits + 1, 0..2, k of them; the last step is filled up with zeros.
void put_t5(uint8_t* panel, int64_t panel_bytes, int64_t row, const uint8_t* code, int64_t k) {
  for (int64_t s = 0; s * kT5StepColumns < k; ++s) {
    uint8_t* out = panel + t5_lane(panel_bytes, row, s);
    for (int64_t c = 0; c < 4; ++c) {
      const auto trit = [&](int64_t f) {
        const int64_t i = s * kT5StepColumns + 4 * f + c;
        return i < k ? code[i] : 0;
      };
      const int r = trit(0) + 3 * trit(1) + 9 * trit(2) + 27 * trit(3);
      out[c] = static_cast<uint8_t>(r < 64 ? r | trit(4) << 6 : 192 + 3 * (r - 64) + trit(4));
    }
  }
}

// Trits + 1 as signed codes of three; the last unit is filled up with zeros. See lut_gemv.h.
void put_l3(uint8_t* panel, int64_t row, const uint8_t* code, int64_t k) {
  int32_t sum_of_signs = 0;
  uint8_t* block = panel + kLutHead + row / 16 * kLutBlock;
  for (int64_t u = 0; u < lut_units(k); ++u, block += kLutUnitBytes) {
    for (int64_t c = 0; c < 4; ++c) {
      uint8_t magnitude[8], signs = 0;
      for (int64_t j = 0; j < 8; ++j) {
        int group = 0;
        for (int64_t i = kLutGroup - 1; i >= 0; --i) {
          const int64_t at = u * kLutUnit + j * kLutLookup + c * kLutGroup + i;
          group = 3 * group + (at < k ? code[at] - 1 : 0);
        }
        magnitude[j] = static_cast<uint8_t>(group < 0 ? -group : group);
        signs |= static_cast<uint8_t>((group < 0 ? 1 : 0) << j);
        sum_of_signs += group < 0 ? -1 : 1;
      }
      const int64_t lane = row % 16 * 4 + c;
      for (int64_t v = 0; v < 4; ++v) {
        block[v * 64 + lane] = static_cast<uint8_t>(magnitude[2 * v] | magnitude[2 * v + 1] << 4);
      }
      block[4 * 64 + lane] = signs;
    }
  }
  store(panel + row * 4, 128 * sum_of_signs);
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

// One row of a tensor of floats as f32.
void read_floats(const RawTensor& w, int64_t row, std::vector<float>& out) {
  out.resize(static_cast<size_t>(w.cols));
  dequantize_row(w, row, out);
}

PackedMat pack_bf16_dot(const RawTensor& w, float scale) {
  PackedMat m = allocate(w, PanelKind::kBF16Dot, scale);
  std::memset(m.data.data(), 0, m.data.size());
  std::vector<float> x;
  for (int64_t n = 0; n < w.rows; ++n) {
    read_floats(w, n, x);
    uint8_t* out = panel_of(m, n) + n % kPanelRows * 4;
    for (int64_t k = 0; k < w.cols; ++k) {
      store(out + k / 2 * kStepBytes + k % 2 * 2, f32_to_bf16(x[k]));
    }
  }
  return m;
}

// The i32 sums of products of 8 bits hold 66,000 columns.
constexpr int64_t kMaxByteColumns = 1 << 16;

PackedMat pack_w8(const RawTensor& w, float scale) {
  const Form& f = form(PanelKind::kW8);
  if (w.cols > kMaxByteColumns) {
    throw std::invalid_argument("8 bits a row: " + std::to_string(w.cols) +
                                " columns, expected up to " + std::to_string(kMaxByteColumns));
  }
  PackedMat m = allocate(w, PanelKind::kW8, scale);
  m.row_scales = AlignedBuffer(static_cast<size_t>(m.n_panels() * kPanelRows) * sizeof(float));
  std::memset(m.row_scales.data(), 0, m.row_scales.size());
  auto* scales = reinterpret_cast<float*>(m.row_scales.data());
  std::vector<float> x;
  const int64_t padded = (w.cols + f.block - 1) / f.block * f.block;
  std::vector<uint8_t> code(static_cast<size_t>(padded), static_cast<uint8_t>(f.offset));
  for (int64_t n = 0; n < w.rows; ++n) {
    read_floats(w, n, x);
    float most = 0;
    for (const float v : x) most = std::isfinite(v) ? std::max(most, std::fabs(v)) : INFINITY;
    require_finite(most, w, n);
    scales[n] = most / 127.0f;
    const float inverse = most < 0x1p-120f ? 0.0f : 127.0f / most;
    for (int64_t k = 0; k < w.cols; ++k) {
      code[k] = static_cast<uint8_t>(std::lrint(x[k] * inverse) + f.offset);
    }
    put_plane(panel_of(m, n), n % kPanelRows, code.data(), padded, 0, 8);
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

// The i32 sums of the ternary kernels hold 352,000 columns.
constexpr int64_t kMaxTernaryColumns = 1 << 18;

PackedMat pack_ternary(const RawTensor& w, float scale, PanelKind wanted) {
  if (w.cols > kMaxTernaryColumns) {
    throw std::invalid_argument("ternary tensor with " + std::to_string(w.cols) +
                                " columns: the kernels sum at most " +
                                std::to_string(kMaxTernaryColumns));
  }
  const int64_t n_blocks = w.cols / kSuper;
  const int64_t block_bytes = block_shape(w.type).bytes;
  std::vector<float> d(static_cast<size_t>(w.rows * n_blocks));
  std::vector<float> row_scale(static_cast<size_t>(w.rows), 0.0f);
  bool one_scale_a_row = true, all_trits = true;
  TernaryBlock b;
  for (int64_t i = 0; i < w.rows * n_blocks; ++i) {
    const int64_t n = i / n_blocks;
    decode_ternary(w.type, w.bytes.data() + i * block_bytes, b);
    require_finite(b.d, w, n);
    settle_zero(b);
    d[i] = b.d;
    all_trits = all_trits && *std::max_element(b.code, b.code + kSuper) <= 2;
    if (b.d == 0) continue;
    if (row_scale[n] == 0) row_scale[n] = b.d;
    one_scale_a_row = one_scale_a_row && row_scale[n] == b.d;
  }

  const PanelKind kind = !one_scale_a_row ? PanelKind::kI2Blocks
                         : all_trits      ? wanted
                                          : PanelKind::kI2;
  PackedMat m = allocate(w, kind, scale);
  if (one_scale_a_row) {
    row_scale.resize(static_cast<size_t>(m.n_panels() * kPanelRows), 0.0f);
    m.row_scales = AlignedBuffer(row_scale.size() * sizeof(float));
    std::memcpy(m.row_scales.data(), row_scale.data(), m.row_scales.size());
  }
  std::vector<uint8_t> code(static_cast<size_t>(w.cols));
  for (int64_t n = 0; n < w.rows; ++n) {
    for (int64_t j = 0; j < n_blocks; ++j) {
      decode_ternary(w.type, w.bytes.data() + (n * n_blocks + j) * block_bytes, b);
      settle_zero(b);
      std::memcpy(&code[j * kSuper], b.code, kSuper);
    }
    uint8_t* panel = panel_of(m, n);
    const int64_t row = n % kPanelRows;
    if (kind == PanelKind::kT5) {
      put_t5(panel, m.panel_bytes, row, code.data(), w.cols);
    } else if (kind == PanelKind::kL3) {
      put_l3(panel, row, code.data(), w.cols);
    } else if (kind == PanelKind::kI2) {
      put_plane(panel, row, code.data(), w.cols, 0, 2);
    } else {
      for (int64_t j = 0; j < n_blocks; ++j, panel += m.panel_bytes / n_blocks) {
        Block block;
        std::memcpy(block.code, &code[j * kSuper], kSuper);
        block.d = std::bit_cast<uint32_t>(d[n * n_blocks + j]);
        put_block(form(kind), panel, row, block);
      }
    }
  }
  return m;
}

// One block of the file as the panel holds it.
template <class FileBlock>
void take(const FileBlock& from, Block& to) {
  std::memcpy(to.code, from.code, sizeof from.code);
  to.d = from.d;
  if constexpr (requires { from.scale; }) std::memcpy(to.scale, from.scale, sizeof from.scale);
  if constexpr (requires { from.min; }) std::memcpy(to.min, from.min, sizeof from.min);
  if constexpr (requires { from.dmin; }) to.dmin = from.dmin;
  if constexpr (requires { from.m; }) to.dmin = from.m;
}

template <class FileBlock, void (*kDecode)(const uint8_t*, FileBlock&)>
PackedMat pack_blocks(const RawTensor& w, PanelKind kind, float scale) {
  const Form& f = form(kind);
  const BlockShape shape = block_shape(w.type);
  PackedMat m = allocate(w, kind, scale);
  const int64_t n_blocks = w.cols / shape.weights, block_bytes = m.panel_bytes / n_blocks;
  const uint8_t* in = w.bytes.data();
  FileBlock from;
  Block to;
  for (int64_t n = 0; n < w.rows; ++n) {
    uint8_t* out = panel_of(m, n);
    for (int64_t j = 0; j < n_blocks; ++j, in += shape.bytes, out += block_bytes) {
      kDecode(in, from);
      take(from, to);
      require_finite(static_cast<uint16_t>(to.d), w, n);
      if (f.has_min) require_finite(static_cast<uint16_t>(to.dmin), w, n);
      // Signed codes of the file become unsigned ones of the panel.
      if constexpr (std::is_signed_v<std::remove_reference_t<decltype(from.code[0])>>) {
        for (int64_t k = 0; k < shape.weights; ++k) {
          to.code[k] = static_cast<uint8_t>(from.code[k] + f.offset);
        }
      }
      put_block(f, out, n % kPanelRows, to);
    }
  }
  return m;
}

}  // namespace

std::string_view kind_name(PanelKind kind) {
  constexpr std::string_view kNames[kPanelKinds] = {
      "f32",  "f16",  "bf16", "t5",   "i2",   "i2_blocks", "q4", "q4_1",    "int8",
      "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "l3",        "w8", "bf16_dot"};
  return kNames[static_cast<int>(kind)];
}

PanelKind kind_named(std::string_view name) {
  for (int i = 0; i < kPanelKinds; ++i) {
    if (kind_name(static_cast<PanelKind>(i)) == name) return static_cast<PanelKind>(i);
  }
  throw std::invalid_argument("a packed matrix: expected a known kind");
}

int PackedMat::grain() const { return form(kind).grain; }

Panels PackedMat::view() const {
  return {kind,        rows,        cols,
          panel_bytes, data.data(), reinterpret_cast<const float*>(row_scales.data()),
          scale};
}

Floats floats_named(std::string_view name) {
  if (name == "exact") return Floats::kExact;
  if (name == "bf16") return Floats::kBF16;
  if (name == "w8") return Floats::kW8;
  throw std::invalid_argument("floats \"" + std::string(name) + "\": expected exact, bf16 or w8");
}

PackedMat pack(const RawTensor& w, float scale, PanelKind ternary, Floats floats) {
  require_whole(w);
  if (!std::isfinite(scale)) throw std::invalid_argument("the scale of a matrix is not finite");
  const bool is_float = block_shape(w.type).weights == 1;
  if (is_float && floats == Floats::kBF16) return pack_bf16_dot(w, scale);
  if (is_float && floats == Floats::kW8) return pack_w8(w, scale);
  switch (w.type) {
    case TensorType::kF32:
      return pack_float<uint32_t>(w, PanelKind::kF32, scale);
    case TensorType::kF16:
      return pack_float<uint16_t>(w, PanelKind::kF16, scale);
    case TensorType::kBF16:
      return pack_float<uint16_t>(w, PanelKind::kBF16, scale);
    case TensorType::kTQ1_0:
    case TensorType::kTQ2_0:
      return pack_ternary(w, scale, ternary);
    case TensorType::kQ4_0:
      return pack_blocks<Q4Block, decode_q4_0>(w, PanelKind::kQ4, scale);
    case TensorType::kQ4_1:
      return pack_blocks<Q41Block, decode_q4_1>(w, PanelKind::kQ4_1, scale);
    case TensorType::kQ8_0:
      return pack_blocks<Q8Block, decode_q8_0>(w, PanelKind::kInt8, scale);
    case TensorType::kQ2_K:
      return pack_blocks<Q2KBlock, decode_q2_k>(w, PanelKind::kQ2K, scale);
    case TensorType::kQ3_K:
      return pack_blocks<Q3KBlock, decode_q3_k>(w, PanelKind::kQ3K, scale);
    case TensorType::kQ4_K:
      return pack_blocks<Q4KBlock, decode_q4_k>(w, PanelKind::kQ4K, scale);
    case TensorType::kQ5_K:
      return pack_blocks<Q5KBlock, decode_q5_k>(w, PanelKind::kQ5K, scale);
    case TensorType::kQ6_K:
      return pack_blocks<Q6KBlock, decode_q6_k>(w, PanelKind::kQ6K, scale);
  }
  throw std::invalid_argument("unreachable: block_shape names every type");
}

PackedMat packed_from(const KeptPanels& kept) {
  const auto expect = [](bool fine, const char* what) {
    if (!fine) throw std::invalid_argument(std::string("a packed matrix: expected ") + what);
  };
  const auto& [kind, rows, cols, scale, data, row_scales] = kept;
  constexpr int64_t kMost = int64_t{1} << 40;  // rows * cols * 4 bytes stay within int64
  expect(rows >= 1 && cols >= 1 && cols < kMost && rows < kMost / cols, "rows and columns");
  const int grain = form(kind).grain;
  const bool is_float = grain == kGrainFloat || grain == kGrainBF16;
  const int block = is_float || kind == PanelKind::kW8 ? 1 : grain == 32 ? 32 : 256;
  expect(cols % block == 0, "rows of whole blocks");
  const bool ternary = grain == kGrainRow || grain == kGrainTables;
  const int64_t most = kind == PanelKind::kW8 ? kMaxByteColumns : kMaxTernaryColumns;
  expect(!ternary || cols <= most, "columns that an i32 can sum");
  expect(std::isfinite(scale), "a finite scale");
  PackedMat m;
  m.kind = kind;
  m.rows = rows;
  m.cols = cols;
  m.scale = scale;
  m.panel_bytes = bytes_per_panel(kind, cols);
  const size_t n_scales = form(kind).scheme == Scheme::kRow ? m.n_panels() * kPanelRows : 0;
  expect(data.size() == static_cast<size_t>(m.n_panels() * m.panel_bytes), "whole panels");
  expect(row_scales.size() == n_scales * sizeof(float), "a scale for each row of its panels");
  m.data = AlignedBuffer(data);
  if (n_scales > 0) m.row_scales = AlignedBuffer(row_scales);
  return m;
}

void unpack_row(const PackedMat& w, int64_t row, std::span<float> out) {
  if (row < 0 || row >= w.rows || static_cast<int64_t>(out.size()) != w.cols) {
    throw std::invalid_argument("unpack_row: row or output size out of range");
  }
  const Panels panels = w.view();
  const uint8_t* panel = w.data.data() + row / kPanelRows * w.panel_bytes;
  const int64_t r = row % kPanelRows;
  const PanelRow p(panels, row);
  for (int64_t k = 0; k < w.cols; ++k) {
    switch (form(w.kind).scheme) {
      case Scheme::kFloat:
        if (w.kind == PanelKind::kBF16Dot) {
          out[k] = bf16_to_f32(load<uint16_t>(panel + k / 2 * kStepBytes + r * 4 + k % 2 * 2));
          break;
        }
        out[k] = w.kind == PanelKind::kF32 ? load<float>(panel + (k * 64 + r) * 4)
                 : w.kind == PanelKind::kF16
                     ? f16_to_f32(load<uint16_t>(panel + (k * 64 + r) * 2))
                     : bf16_to_f32(load<uint16_t>(panel + (k * 64 + r) * 2));
        break;
      case Scheme::kRow:
        out[k] = panels.row_scales[row] * static_cast<float>(p.code(k));
        break;
      case Scheme::kBlocks:
        out[k] = p.d(k) * static_cast<float>(p.code(k));
        break;
      case Scheme::kGroup:
        out[k] = p.d(k) * static_cast<float>(p.code(k));
        if (form(w.kind).has_min) out[k] += p.dmin(k);
        break;
      case Scheme::kSuper:
        out[k] = p.d(k) * static_cast<float>(p.scale(k)) * static_cast<float>(p.code(k));
        if (form(w.kind).has_min) out[k] -= p.dmin(k) * static_cast<float>(p.min(k));
        break;
    }
  }
}

}  // namespace nearfar
