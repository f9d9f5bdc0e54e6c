// Lookups with NEON, for all its levels: TBL on a table of 16 bytes.
//
// LD4 brings byte c of 16 rows into one register, so a lane is a row and the whole register looks
// into the table of group c. Entries lose their 128 with the table, not with the sum, and are
// multiplied by their signs on the way into i16:
//   TBL, SMLAL, SMLAL2 for 16 rows x 3 k = 48 multiply-adds of a token,
// where 2-bit codes take 6 SMLAL, and SDOT 3. With plain NEON that is half the work, with dot
// products only fewer bytes.
//
// An int16 takes 4 * 127 = 508 a lookup: 64 lookups, 32512, then it is added to an i32.
#include <arm_neon.h>

#include "check.h"
#include "lut_gemv.h"

namespace nearfar::neon {
namespace {

constexpr int kTile = 4;       // tokens that share what is unpacked: 8 registers of sums
constexpr int64_t kUnits = 8;  // of a K block: 64 lookups

// Tokens of a tile: the tables of each, and what 16 rows have summed.
template <int M>
struct Tile {
  const uint8_t* tables[M];
  int16x8_t low[M], high[M];  // rows 0..7 and 8..15
};

// Lookup `j` of a unit, 16 rows and M tokens: codes and signs by group.
template <int M>
inline void look_up(Tile<M>& t, int64_t j, const uint8x16_t (&code)[4], const uint8x16x4_t& signs) {
  const uint8x16_t bit = vdupq_n_u8(static_cast<uint8_t>(1 << j));
  for (int c = 0; c < 4; ++c) {
    const uint8x16_t negative = vtstq_u8(signs.val[c], bit);  // 0 or -1
    const int8x16_t sign = vreinterpretq_s8_u8(vorrq_u8(negative, vdupq_n_u8(1)));
    for (int m = 0; m < M; ++m) {
      const uint8x16_t table = vld1q_u8(t.tables[m] + j * kLutTableBytes + 16 * c);
      const uint8x16_t around_0 = veorq_u8(table, vdupq_n_u8(128));
      const int8x16_t e = vreinterpretq_s8_u8(vqtbl1q_u8(around_0, code[c]));
      t.low[m] = vmlal_s8(t.low[m], vget_low_s8(e), vget_low_s8(sign));
      t.high[m] = vmlal_high_s8(t.high[m], e, sign);
    }
  }
}

template <int M>
inline void add_unit(Tile<M>& t, const uint8_t* block) {
  const uint8x16x4_t signs = vld4q_u8(block + 4 * 64);
  for (int v = 0; v < 4; ++v) {
    const uint8x16x4_t bytes = vld4q_u8(block + 64 * v);
    uint8x16_t even[4], odd[4];
    for (int c = 0; c < 4; ++c) {
      even[c] = vandq_u8(bytes.val[c], vdupq_n_u8(15));
      odd[c] = vshrq_n_u8(bytes.val[c], 4);
    }
    look_up(t, 2 * v, even, signs);
    look_up(t, 2 * v + 1, odd, signs);
  }
  for (int m = 0; m < M; ++m) t.tables[m] += kLutUnitTables;
}

// y = (row_scale * table_scale) * sum * scale for the rows n.. of w that exist, at most 16
inline void store_rows(const Panels& w, int64_t n, float table_scale, const int32_t* sum,
                       float* y) {
  const int64_t rows = w.rows - n < 16 ? w.rows - n : 16;
  for (int64_t r = 0; r < rows; ++r) {
    y[n + r] = w.row_scales[n + r] * table_scale * static_cast<float>(sum[r]) * w.scale;
  }
}

// The rows [i, i + M) of x and 16 rows of w from n on, whose codes begin at `block`.
template <int M>
inline void run(const Panels& w, const Rows& x, int64_t i, int64_t n, const uint8_t* block,
                float* y, int64_t ldy) {
  Tile<M> t;
  int32x4_t sums[M][4] = {};
  for (int m = 0; m < M; ++m) t.tables[m] = x.tables + (i + m) * x.tables_stride;
  const int64_t units = lut_units(w.cols);
  for (int64_t u = 0; u < units; u += kUnits) {
    for (int m = 0; m < M; ++m) t.low[m] = t.high[m] = vdupq_n_s16(0);
    const int64_t end = u + kUnits < units ? u + kUnits : units;
    for (int64_t v = u; v < end; ++v) add_unit(t, block + v * kLutUnitBytes);
    for (int m = 0; m < M; ++m) {
      sums[m][0] = vaddw_s16(sums[m][0], vget_low_s16(t.low[m]));
      sums[m][1] = vaddw_high_s16(sums[m][1], t.low[m]);
      sums[m][2] = vaddw_s16(sums[m][2], vget_low_s16(t.high[m]));
      sums[m][3] = vaddw_high_s16(sums[m][3], t.high[m]);
    }
  }
  for (int m = 0; m < M; ++m) {
    int32_t sum[16];
    __builtin_memcpy(sum, sums[m], sizeof sum);
    store_rows(w, n, x.table_scales[i + m], sum, y + (i + m) * ldy);
  }
}

template <int M>
inline void run_tile(int64_t tokens, const Panels& w, const Rows& x, int64_t i, int64_t n,
                     const uint8_t* block, float* y, int64_t ldy) {
  if (tokens == M) return run<M>(w, x, i, n, block, y, ldy);
  if constexpr (M > 1) run_tile<M - 1>(tokens, w, x, i, n, block, y, ldy);
}

// Trit i of the 16 entries, zero in the last two.
struct Patterns {
  int16_t trit[3][16];
};
constexpr Patterns make_patterns() {
  Patterns p{};
  for (int i = 0; i < 3; ++i) {
    for (int e = 0; e < kLutCodes; ++e) p.trit[i][e] = static_cast<int16_t>(lut_trit(e, i));
  }
  return p;
}
constexpr Patterns kPatterns = make_patterns();

// 4 bytes of a table, in the low 16 bits of their lanes. Adding 1.5 * 2^23 + 128 rounds to nearest
// even and leaves the byte in the low bits of the sum.
inline uint16x4_t entries(int16x4_t sum, float f) {
  const float32x4_t wide = vcvtq_f32_s32(vmovl_s16(sum));
  const float32x4_t rounded = vfmaq_n_f32(vdupq_n_f32(12582912.0f + 128.0f), wide, f);
  return vmovn_u32(vreinterpretq_u32_f32(rounded));
}

}  // namespace

void matmul_l3(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y, int64_t ldy) {
  NF_DCHECK(w.cols == x.cols);
  for (int64_t p = first; p < last; ++p) {
    const uint8_t* codes = w.data + p * w.panel_bytes + kLutHead;
    for (int64_t i = 0; i < x.m; i += kTile) {
      for (int64_t b = 0; b < 4 && p * kPanelRows + b * 16 < w.rows; ++b) {
        run_tile<kTile>(x.m - i < kTile ? x.m - i : kTile, w, x, i, p * kPanelRows + b * 16,
                        codes + b * kLutBlock, y, ldy);
      }
    }
  }
}

float lut_tables(const int8_t* q, int64_t cols, uint8_t* tables) {
  const auto at = [&](int64_t k) { return k < cols ? q[k] : int8_t{0}; };
  const auto magnitude = [&](int64_t k) { return at(k) < 0 ? -at(k) : at(k); };
  int most = 0;
  for (int64_t k = 0; k < cols; k += kLutGroup) {
    const int sum = magnitude(k) + magnitude(k + 1) + magnitude(k + 2);
    most = sum > most ? sum : most;
  }
  const float f = most <= 127 ? 1.0f : 127.0f / static_cast<float>(most);
  for (int64_t k = 0; k < lut_units(cols) * kLutUnit; k += kLutGroup, tables += 16) {
    uint8x8_t half[2];
    for (int h = 0; h < 2; ++h) {
      int16x8_t sum = vmulq_n_s16(vld1q_s16(kPatterns.trit[0] + 8 * h), at(k));
      sum = vmlaq_n_s16(sum, vld1q_s16(kPatterns.trit[1] + 8 * h), at(k + 1));
      sum = vmlaq_n_s16(sum, vld1q_s16(kPatterns.trit[2] + 8 * h), at(k + 2));
      half[h] =
          vmovn_u16(vcombine_u16(entries(vget_low_s16(sum), f), entries(vget_high_s16(sum), f)));
    }
    vst1q_u8(tables, vcombine_u8(half[0], half[1]));
  }
  return most <= 127 ? 1.0f : static_cast<float>(most) / 127.0f;
}

}  // namespace nearfar::neon
