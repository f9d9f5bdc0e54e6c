// The kernels: products of panels and rows of activations, one file and one namespace per ISA.
//
// Contract of each (see Matmul in mat.h): w has the kind in the kernel's name, x the kind's grain
// and x.cols == w.cols. Integer sums are exact in any order. Floats follow one order, the same on
// every ISA, for every M and every split of panels, so that all give the bits of `ref`:
//
//   i2         y = ((row_scale * s_x) * (sum q*code - sum q)) * scale
//   i2_blocks  F = fma(s_w, sum q*w, F) over 256s in order;                  y = (F * s_x) * scale
//   q4, int8   F = fma(s_w * s_x, sum q*w, F) over 32s in order;             y = F * scale
//   q4_k       F = fma(d * s_x, S, F); F = fma(-(dmin * s_x), Min, F) over 256s;
//              S = sum_j scale_j * sum q*code, Min = sum_j min_j * sum q;    y = F * scale
//   int8_k     F = fma(d * s_x, sum_j scale_j * sum q*w, F) over 256s;       y = F * scale
//   f32 f16 bf16   F = fma(w, x, F) over k in order;                         y = F * scale
//
// A kernel file includes <immintrin.h> and headers like this one, and keeps all else in an
// anonymous namespace: `nm -C` must show no weak symbol in its object.
#pragma once

#include "mat.h"

namespace nearfar {

namespace ref {
Matmul matmul_f32, matmul_f16, matmul_bf16, matmul_i2, matmul_i2_blocks, matmul_q4, matmul_q4_k,
    matmul_int8, matmul_int8_k;
}
namespace avx2 {
Matmul matmul_f32, matmul_f16, matmul_bf16, matmul_i2, matmul_i2_blocks, matmul_q4, matmul_q4_k,
    matmul_int8, matmul_int8_k;
}
namespace avx512 {
Matmul matmul_f32, matmul_f16, matmul_bf16, matmul_i2, matmul_i2_blocks, matmul_q4, matmul_q4_k,
    matmul_int8, matmul_int8_k;
}

}  // namespace nearfar
