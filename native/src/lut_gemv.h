// Products by lookup, for ternary matrices with one scale a row (PanelKind::kL3). Opt-in: sums of
// activations are rounded to 8 bits, so the result is near the integer product, not equal to it.
//
// Three trits t are one code c = t0 + 3 t1 + 9 t2. Negating the trits negates what they add up to,
// so only |c| = 0..13 is looked up and the sign multiplies afterwards: a table has 16 bytes.
// The idea is that of LUT Tensor Core (2408.06003: symmetrized tables, precomputed once per
// activation, elongated tiles) and T-MAC (2407.00088: byte shuffles as lookups on CPUs).
//
// A lookup is 12 k: four groups of 3, and four tables side by side, 64 bytes:
//   byte 16 c + e = 128 + rint(f * sum_e),   sum_e = the sum over trits of e of q[12 l + 3 c + i]
//   f = min(1, 127 / max over all groups of the row of |q0| + |q1| + |q2|), in f32
// The product is exact before it is rounded, half to even; entries 14 and 15 are 128.
//
//   y = ((row_scale * (s_x * step)) * (sum sign * byte - 128 * sum sign)) * scale,  step = 1 / f
//
// with the sums over all groups, and `128 * sum sign` a constant of the row, kept in the panel.
// The largest sum is 255 for each 3 k: 2.2e7 at K = 2^18, far inside i32.
//
// Error. An entry is off by at most 1/2 + 2^-15 (f is rounded), entry 0 and, with f = 1, all by
// nothing, so against the exact product of the same q
//   |y_lut - y_exact| <= |row_scale * s_x * scale| * step * kLutEntryError * ceil(K / 3)
// and three float roundings.  On average it is far smaller: errors of groups are independent, so
// it grows with the root of K / 3.
//
// Row invariance holds: the integer sums are exact in any order, for any M.
#pragma once

#include "mat.h"

namespace nearfar {

constexpr int64_t kLutGroup = 3;    // k of a code
constexpr int64_t kLutLookup = 12;  // k of a lookup
constexpr int64_t kLutUnit = 96;    // k of eight lookups, which share a block of signs
constexpr int64_t kLutCodes = 14;   // |c|
constexpr int64_t kLutTableBytes = 64;
constexpr int64_t kLutUnitTables = kLutUnit / kLutLookup * kLutTableBytes;  // bytes

// A panel: 64 i32 `128 * sum sign`, then units of 96 k, each four blocks of 16 rows. A block is
// four vectors of codes and one of signs, 64 bytes each: lane r is a row, byte c the group c of a
// lookup. Vector v holds lookup 2v in its low nibbles and 2v + 1 in its high ones; bit j of a sign
// is set where the code of lookup j is negative.  40 bits for 24 k: 1.67 bits a weight.
constexpr int64_t kLutHead = kPanelRows * 4;
constexpr int64_t kLutBlock = 5 * 64;
constexpr int64_t kLutUnitBytes = 4 * kLutBlock;

constexpr int64_t lut_units(int64_t cols) { return (cols + kLutUnit - 1) / kLutUnit; }

constexpr float kLutEntryError = 0.5f + 0x1p-15f;

// Trit i of code 0..13.
constexpr int lut_trit(int code, int i) {
  for (; i > 0; --i) code = (code + 1) / 3;
  return (code + 1) % 3 - 1;
}

// The tables of one row, q[cols] in -127..127, -> tables[lut_units(cols) * kLutUnitTables], 64-byte
// aligned; k beyond cols count as zeros.  Returns `step`.  The bits of `ref` on every ISA.
using LutTables = float(const int8_t* q, int64_t cols, uint8_t* tables);

namespace ref {
Matmul matmul_l3;
LutTables lut_tables;
}  // namespace ref
namespace avx2 {
Matmul matmul_l3;
LutTables lut_tables;
}  // namespace avx2
namespace avx512 {
Matmul matmul_l3;
LutTables lut_tables;
}  // namespace avx512
namespace neon {  // of all three levels
Matmul matmul_l3;
LutTables lut_tables;
}  // namespace neon

}  // namespace nearfar
