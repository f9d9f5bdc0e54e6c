// What flows into a kernel: plain views, owned elsewhere (PackedMat in quant.h, QuantRows in
// activations.h). Kernel files include this header, so it holds no inline function and no standard
// container: a template compiled with AVX-512 flags must never win over the portable one at link
// time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nearfar {

// Numbers of the tensor types in a GGUF file.
enum class TensorType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBF16 = 30,
  kTQ1_0 = 34,
  kTQ2_0 = 35,
};

// The packed form of a matrix in memory, drawn in quant.h. One kernel per kind and ISA.
enum class PanelKind : uint8_t {
  kF32,       // F32
  kF16,       // F16
  kBF16,      // BF16
  kT5,        // TQ1_0, TQ2_0: five trits a byte, one f32 scale a row
  kI2,        // TQ1_0, TQ2_0: 2-bit codes, one f32 scale a row
  kI2Blocks,  // TQ1_0, TQ2_0 whose block scales differ within a row: one f32 scale per 256
  kQ4,        // Q4_0: 4-bit codes, f16 scale per 32
  kQ4_1,      // Q4_1: 4-bit codes, f16 scale and min per 32
  kInt8,      // Q8_0: 8-bit codes, f16 scale per 32
  kQ2K,       // Q2_K: 2-bit codes, integer scale and min per 16, f16 d and dmin per 256
  kQ3K,       // Q3_K: 3-bit codes, int8 scale per 16, f16 d per 256
  kQ4K,       // Q4_K: 4-bit codes, integer scale and min per 32, f16 d and dmin per 256
  kQ5K,       // Q5_K: 5-bit codes, the rest as Q4_K
  kQ6K,       // Q6_K: 6-bit codes, the rest as Q3_K
  kL3,        // TQ1_0, TQ2_0 by lookup: three trits a code, one f32 scale a row (lut_gemv.h)
  kW8,        // floats, rounded to 8 bits: one f32 scale a row
  kBF16Dot,   // floats, rounded to bf16, that multiply bf16 activations
};
constexpr int kPanelKinds = 17;

constexpr int64_t kPanelRows = 64;  // rows of a panel: four 16-row blocks, an i32 lane is a row

// How the integer sums of a row become numbers; the equations stand in dot_gemv.h.
enum class Scheme : uint8_t {
  kFloat,   // no codes
  kRow,     // one f32 scale a row
  kBlocks,  // one f32 scale per 256
  kGroup,   // one f16 scale per 32
  kSuper,   // d times an integer scale per 16 or 32
};

// What the codes of a kind look like. A panel is a run of blocks of `block` k: `head` bytes of
// scales, then for each `unit` k `side` bytes of integer scales and mins, the plane of the `low`
// lowest bits of the codes and the plane of the `high` bits above them (quant.h draws a plane).
struct Form {
  Scheme scheme;
  int low, high;    // bits of a code
  int offset;       // a weight is its scale times (code - offset)
  bool has_min;     // and less its min
  int block, unit;  // k
  int group;        // k that share an integer scale; for Scheme::kGroup, a scale
  int head, side;   // bytes
  int grain;        // of the activations
};

// Activations stay f32 (grain of the float kinds), or share one int8 scale per row.
constexpr int kGrainFloat = -1;
constexpr int kGrainRow = 0;
constexpr int kGrainTables = -2;  // as kGrainRow, and of its int8 the tables that kL3 looks into
constexpr int kGrainBF16 = -3;    // bf16

// By PanelKind. kT5 and kL3 pack trits together and not by planes: their units are 4 x 64 and
// 20 x 64 bytes, and `low` is only what their codes unpack to.
constexpr Form kForms[kPanelKinds] = {
    {Scheme::kFloat, 0, 0, 0, false, 1, 1, 1, 0, 0, kGrainFloat},
    {Scheme::kFloat, 0, 0, 0, false, 1, 1, 1, 0, 0, kGrainFloat},
    {Scheme::kFloat, 0, 0, 0, false, 1, 1, 1, 0, 0, kGrainFloat},
    {Scheme::kRow, 2, 0, 1, false, 20, 20, 20, 0, 0, kGrainRow},
    {Scheme::kRow, 2, 0, 1, false, 16, 16, 16, 0, 0, kGrainRow},
    {Scheme::kBlocks, 2, 0, 1, false, 256, 16, 256, 256, 0, kGrainRow},
    {Scheme::kGroup, 4, 0, 8, false, 32, 32, 32, 128, 0, 32},
    {Scheme::kGroup, 4, 0, 0, true, 32, 32, 32, 256, 0, 32},
    {Scheme::kGroup, 8, 0, 128, false, 32, 32, 32, 128, 0, 32},
    {Scheme::kSuper, 2, 0, 0, true, 256, 16, 16, 256, 64, 256},
    {Scheme::kSuper, 2, 1, 4, false, 256, 32, 16, 128, 128, 256},
    {Scheme::kSuper, 4, 0, 0, true, 256, 32, 32, 256, 128, 256},
    {Scheme::kSuper, 4, 1, 0, true, 256, 32, 32, 256, 128, 256},
    {Scheme::kSuper, 4, 2, 32, false, 256, 32, 16, 128, 128, 256},
    {Scheme::kRow, 2, 0, 1, false, 96, 96, 96, 0, 0, kGrainTables},
    {Scheme::kRow, 8, 0, 128, false, 64, 64, 64, 0, 0, kGrainRow},
    {Scheme::kFloat, 0, 0, 0, false, 1, 1, 1, 0, 0, kGrainBF16},
};

// A packed matrix [rows, cols]: ceil(rows / 64) panels of panel_bytes each, 64-byte aligned.
struct Panels {
  PanelKind kind;
  int64_t rows, cols;
  int64_t panel_bytes;
  const uint8_t* data;
  const float* row_scales;  // Scheme::kRow: f32 per row, padded to whole panels; else null
  float scale;              // multiplies every product; 1 unless the file has a `.scale` tensor
  int64_t ahead = 0;        // bytes that kernels fetch ahead of their reads; 0: hardware does it
};

// Activations [m, cols] in the form that one grain asks for.
//   grain kGrainFloat: x only. Else: q and scales with x ≈ q * scale, |q| <= 127, and sums of q.
//   grain 0: one scale a row, sums per 256;  32: scale and sum per 32;
//   256: scale per 256, sums per 16;  kGrainTables: as 0, and the tables of lut_gemv.h.
//   kGrainBF16: bf16 only.
struct Rows {
  int64_t m, cols;
  int grain;
  const float* x;       // [m, x_stride]
  const int8_t* q;      // [m, q_stride]; zeros lie behind each row: 16, and up to a multiple of 64
  const float* scales;  // [m, n_scales]
  const int32_t* sums;  // [m, n_sums]
  int64_t x_stride, q_stride, n_scales, n_sums;
  const uint8_t* tables;      // [m, tables_stride]
  const float* table_scales;  // [m]: scales * step
  int64_t tables_stride;
  const uint16_t* bf16;  // [m, bf16_stride]; zeros lie behind each row up to a multiple of 32
  int64_t bf16_stride;
};

// y[i, n] = scale * sum_k W[n, k] * x[i, k] for all i < x.m and the rows n of panels [first, last).
// y is the whole output [x.m, w.rows] with row stride ldy. Writes all those y[i, n], allocates
// nothing.
using Matmul = void(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                    int64_t ldy);

}  // namespace nearfar
