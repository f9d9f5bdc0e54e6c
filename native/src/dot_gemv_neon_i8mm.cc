// NEON kernels for CPUs with i8mm (Neoverse V1, Cortex-A510, A710 and later, Apple M2).
//
// USDOT takes unsigned codes as they are: bytes w + 128 stay, -128 sum q repairs them. Two tokens
// share USMMLA, which multiplies 2 rows x 8 k with 2 tokens x 8 k, twice the work of a dot product:
// two registers of 4 rows x 4 k zip into rows 0, 1 and rows 2, 3 of 8 k.
#include <arm_neon.h>

#include "check.h"
#include "dot_gemv.h"

#define NF_LEVEL neon_i8mm

namespace nearfar {
namespace {

constexpr bool kSignedCodes = false;

// rows 0, 1 and rows 2, 3 of 8 k
struct RowPairs {
  uint8x16_t rows01, rows23;
};
inline RowPairs zip(uint8x16_t first4, uint8x16_t last4) {
  const uint32x4_t a = vreinterpretq_u32_u8(first4), b = vreinterpretq_u32_u8(last4);
  return {vreinterpretq_u8_u32(vzip1q_u32(a, b)), vreinterpretq_u8_u32(vzip2q_u32(a, b))};
}

template <int M>
struct Sums {
  static constexpr int kPairs = M / 2;  // of tokens; an odd one is left for `last`

  // Lanes: first row with first and second token, second row with both.
  int32x4_t rows01[kPairs + 1], rows23[kPairs + 1];
  int32x4_t last;

  void clear() {
    for (int p = 0; p < kPairs; ++p) rows01[p] = rows23[p] = vdupq_n_s32(0);
    last = vdupq_n_s32(0);
  }

  template <int kMaxCode>
  void add(const uint8x16_t (&code)[4], const int8_t* q, int64_t stride) {
    if constexpr (kPairs > 0) {
      const RowPairs k0 = zip(code[0], code[1]), k8 = zip(code[2], code[3]);
      for (int p = 0; p < kPairs; ++p) {
        const int64x2_t x = vreinterpretq_s64_s8(vld1q_s8(q + 2 * p * stride));
        const int64x2_t y = vreinterpretq_s64_s8(vld1q_s8(q + (2 * p + 1) * stride));
        const int8x16_t q0 = vreinterpretq_s8_s64(vzip1q_s64(x, y));
        const int8x16_t q8 = vreinterpretq_s8_s64(vzip2q_s64(x, y));
        rows01[p] = vusmmlaq_s32(vusmmlaq_s32(rows01[p], k0.rows01, q0), k8.rows01, q8);
        rows23[p] = vusmmlaq_s32(vusmmlaq_s32(rows23[p], k0.rows23, q0), k8.rows23, q8);
      }
    }
    if constexpr (M % 2 == 1) {
      const int8x16_t x = vld1q_s8(q + (M - 1) * stride);
      last = vusdotq_laneq_s32(last, code[0], x, 0);
      last = vusdotq_laneq_s32(last, code[1], x, 1);
      last = vusdotq_laneq_s32(last, code[2], x, 2);
      last = vusdotq_laneq_s32(last, code[3], x, 3);
    }
  }

  int32x4_t of(int m) const {
    const int p = m / 2;
    if (p == kPairs) return last;
    return m % 2 == 0 ? vuzp1q_s32(rows01[p], rows23[p]) : vuzp2q_s32(rows01[p], rows23[p]);
  }
};

}  // namespace
}  // namespace nearfar

#include "dot_gemv_neon_body.h"
