// The kernels: products of panels and rows of activations, one file and one namespace per ISA.
//
// Contract of each (see Matmul in mat.h): w has the kind of its place in the table, x the kind's
// grain and x.cols == w.cols. Integer sums are exact in any order. Floats follow one order, the
// same on every ISA, for every M and every split of panels, so that all give the bits of `ref`.
// With code' = code - offset (kForms in mat.h), by Scheme:
//
//   kRow      y = ((row_scale * s_x) * sum q*code') * scale
//   kBlocks   F = fma(s_w, sum q*code', F) over 256s in order;               y = (F * s_x) * scale
//   kGroup    F = fma(s_w * s_x, sum q*code', F) over 32s in order,
//             after each, with mins: F = fma(m * s_x, sum q, F);              y = F * scale
//   kSuper    over 256s in order: S = fma(scale_j, sum_j q*code', S) and
//             B = fma(min_j, sum_j q, B) over the groups j in order,
//             F = fma(d * s_x, S, F), with mins F = fma(-(dmin * s_x), B, F); y = F * scale
//   kFloat    F = fma(w, x, F) over k in order;                               y = F * scale
//
// But for kBF16Dot, where a level may add in an order of its own: the same for every M and every
// split, near that of `ref`.
//
// S and B are whole numbers and exact while below 2^24, as they nearly always are.
//
// A kernel file includes <immintrin.h> or <arm_neon.h> and headers like this one, and keeps all
// else in an anonymous namespace: `nm -C` must show no weak symbol in its object.
#pragma once

#include "mat.h"

namespace nearfar {

// By PanelKind. Null: this ISA has no kernel of its own, `ref` stands in.
namespace ref {
extern Matmul* const kMatmul[kPanelKinds];
}
namespace avx2 {
extern Matmul* const kMatmul[kPanelKinds];
}
namespace avxvnni {
extern Matmul* const kMatmul[kPanelKinds];
}
namespace avx512 {
extern Matmul* const kMatmul[kPanelKinds];
}
namespace avx512bf16 {
Matmul matmul_bf16_dot;
}
namespace amx {
extern Matmul* const kMatmul[kPanelKinds];
}

namespace neon {
extern Matmul* const kMatmul[kPanelKinds];
Matmul matmul_f32, matmul_f16, matmul_bf16;  // of all three levels
}  // namespace neon
namespace neon_dot {
extern Matmul* const kMatmul[kPanelKinds];
}
namespace neon_i8mm {
extern Matmul* const kMatmul[kPanelKinds];
}

}  // namespace nearfar
