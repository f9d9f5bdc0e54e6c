// The scalar truth of the lookups: each code is read from the panel by its index.
#include <math.h>
#include <stdlib.h>

#include "check.h"
#include "lut_gemv.h"

namespace nearfar::ref {
namespace {

int32_t load_i32(const uint8_t* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return v;
}

// sum sign * table entry over the groups of row r
int32_t lookups(const uint8_t* panel, int64_t r, const uint8_t* tables, int64_t units) {
  int32_t sum = 0;
  for (int64_t u = 0; u < units; ++u) {
    const uint8_t* block = panel + kLutHead + u * kLutUnitBytes + r / 16 * kLutBlock;
    for (int64_t j = 0; j < 8; ++j, tables += kLutTableBytes) {
      for (int64_t c = 0; c < 4; ++c) {
        const int64_t lane = r % 16 * 4 + c;
        const int code = block[j / 2 * 64 + lane] >> (j % 2 * 4) & 15;
        const bool negative = block[256 + lane] >> j & 1;
        const int32_t entry = tables[16 * c + code];
        sum += negative ? -entry : entry;
      }
    }
  }
  return sum;
}

}  // namespace

void matmul_l3(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y, int64_t ldy) {
  NF_DCHECK(w.cols == x.cols);
  const int64_t units = lut_units(w.cols);
  const int64_t end = last * kPanelRows < w.rows ? last * kPanelRows : w.rows;
  for (int64_t n = first * kPanelRows; n < end; ++n) {
    const uint8_t* panel = w.data + n / kPanelRows * w.panel_bytes;
    const int64_t r = n % kPanelRows;
    for (int64_t i = 0; i < x.m; ++i) {
      const int32_t sum =
          lookups(panel, r, x.tables + i * x.tables_stride, units) - load_i32(panel + r * 4);
      const float scale = w.row_scales[n] * x.table_scales[i];
      y[i * ldy + n] = scale * static_cast<float>(sum) * w.scale;
    }
  }
}

float lut_tables(const int8_t* q, int64_t cols, uint8_t* tables) {
  const auto at = [&](int64_t k) { return k < cols ? static_cast<int>(q[k]) : 0; };
  int most = 0;
  for (int64_t k = 0; k < cols; k += kLutGroup) {
    const int sum = abs(at(k)) + abs(at(k + 1)) + abs(at(k + 2));
    most = sum > most ? sum : most;
  }
  const float f = most <= 127 ? 1.0f : 127.0f / static_cast<float>(most);
  for (int64_t k = 0; k < lut_units(cols) * kLutUnit; k += kLutGroup, tables += 16) {
    for (int e = 0; e < 16; ++e) {
      int sum = 0;
      for (int i = 0; e < kLutCodes && i < kLutGroup; ++i) sum += lut_trit(e, i) * at(k + i);
      // A double holds the product of an f32 and nine bits.
      tables[e] = static_cast<uint8_t>(128 + static_cast<int>(rint(double{f} * sum)));
    }
  }
  return most <= 127 ? 1.0f : static_cast<float>(most) / 127.0f;
}

}  // namespace nearfar::ref
