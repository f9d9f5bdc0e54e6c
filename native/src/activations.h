// Activations: f32 rows on their way into matrices, quantised to int8 once per input and grain and
// shared by the matrices that read it (q, k, v; gate, up).
//
// Per group of `grain` values (0: the whole row): s = max|x| / 127, q = rint(x * (127 / max)), so
// that |q| <= 127: no kernel meets -128. A group whose max is below 2^-120 counts as zeros.
// With grain 32 s is rounded to f16 (below 65504), as ggml stores it, which makes the products of
// both engines equal. All in f32: the bits of nearfar.quant.fake_quantize_activations, on every
// ISA.
//
// For matrices that multiply by lookup the same pass also makes the row's tables (lut_gemv.h).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "lut_gemv.h"
#include "mat.h"
#include "ops.h"
#include "quant.h"

namespace nearfar {

// Rows [m, cols] of one grain. Reuse one object: memory only grows.
class QuantRows {
 public:
  // Room for m rows; what they hold is undefined until quantize_row. Throws std::invalid_argument
  // on an unknown grain or cols that is no multiple of it (tables: of 256).
  void reset(int64_t m, int64_t cols, int grain);
  Rows view() const;
  int64_t m() const { return rows_.m; }
  int64_t cols() const { return rows_.cols; }
  int grain() const { return rows_.grain; }

  // x[cols] becomes row i; rows may be written by several threads. Throws std::invalid_argument
  // when x holds a value that is not finite (int8 grains; f32 rows are copied as they are).
  // `ops`, `lut_tables`: the fastest of this CPU, or the scalar ones; all make the same bits.
  void quantize_row(std::span<const float> x, int64_t i, const Ops& ops = ref::kOps,
                    LutTables* lut_tables = ref::lut_tables);

 private:
  Rows rows_{};
  AlignedBuffer x_, q_, tables_;
  std::vector<float> scales_, table_scales_;
  std::vector<int32_t> sums_;
};

// The rows [first, first + m) of x.
Rows some_rows(const Rows& x, int64_t first, int64_t m);

// x [m, cols] -> out
void quantize_rows(std::span<const float> x, int64_t m, int64_t cols, int grain, QuantRows& out);

}  // namespace nearfar
