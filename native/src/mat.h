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
  kI2,        // TQ1_0, TQ2_0: 2-bit codes, one f32 scale a row
  kI2Blocks,  // TQ1_0, TQ2_0 whose block scales differ within a row: one f32 scale per 256
  kQ4,        // Q4_0: 4-bit codes, f16 scale per 32
  kQ4K,       // Q4_K: 4-bit codes, integer scale and min per 32, f16 d and dmin per 256
  kInt8,      // Q8_0: 8-bit codes, f16 scale per 32
  kInt8K,     // Q6_K: 8-bit codes, int8 scale per 16, f16 d per 256
};
constexpr int kPanelKinds = 9;

constexpr int64_t kPanelRows = 64;  // rows of a panel: four 16-row blocks, an i32 lane is a row

// Activations stay f32 (grain of the float kinds), or share one int8 scale per row.
constexpr int kGrainFloat = -1;
constexpr int kGrainRow = 0;

// A packed matrix [rows, cols]: ceil(rows / 64) panels of panel_bytes each, 64-byte aligned.
struct Panels {
  PanelKind kind;
  int64_t rows, cols;
  int64_t panel_bytes;
  const uint8_t* data;
  const float* row_scales;  // kI2: f32 per row, padded to whole panels; else null
  float scale;              // multiplies every product; 1 unless the file has a `.scale` tensor
};

// Activations [m, cols] in the form that one grain asks for.
//   grain kGrainFloat: x only. Else: q and scales with x ≈ q * scale, |q| <= 127, and sums of q.
//   grain 0: one scale a row, sums per 256;  32: scale and sum per 32;
//   256: scale per 256, sums per 16.
struct Rows {
  int64_t m, cols;
  int grain;
  const float* x;       // [m, x_stride]
  const int8_t* q;      // [m, q_stride]
  const float* scales;  // [m, n_scales]
  const int32_t* sums;  // [m, n_sums]
  int64_t x_stride, q_stride, n_scales, n_sums;
};

// y[i, n] = scale * sum_k W[n, k] * x[i, k] for all i < x.m and the rows n of panels [first, last).
// y is the whole output [x.m, w.rows] with row stride ldy. Writes all those y[i, n], allocates
// nothing.
using Matmul = void(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                    int64_t ldy);

}  // namespace nearfar
