// NEON kernels for CPUs with dot products (dotprod: Cortex-A55, A76 and later, Apple M1).
//
// SDOT multiplies 4 rows x 4 k with 4 activations, taken by element from a register of 16, and adds
// all to i32 lanes, one a row. It is signed on both sides: codes up to 63 are what they are, bytes
// w + 128 flip their top bit back to w.
#include <arm_neon.h>

#include "check.h"
#include "dot_gemv.h"

#define NF_LEVEL neon_dot

namespace nearfar {
namespace {

constexpr bool kSignedCodes = true;

template <int M>
struct Sums {
  int32x4_t sum[M];

  void clear() {
    for (int m = 0; m < M; ++m) sum[m] = vdupq_n_s32(0);
  }

  template <int kMaxCode>
  void add(const uint8x16_t (&code)[4], const int8_t* q, int64_t stride) {
    for (int m = 0; m < M; ++m) {
      const int8x16_t x = vld1q_s8(q + m * stride);
      sum[m] = vdotq_laneq_s32(sum[m], vreinterpretq_s8_u8(code[0]), x, 0);
      sum[m] = vdotq_laneq_s32(sum[m], vreinterpretq_s8_u8(code[1]), x, 1);
      sum[m] = vdotq_laneq_s32(sum[m], vreinterpretq_s8_u8(code[2]), x, 2);
      sum[m] = vdotq_laneq_s32(sum[m], vreinterpretq_s8_u8(code[3]), x, 3);
    }
  }

  int32x4_t of(int m) const { return sum[m]; }
};

}  // namespace
}  // namespace nearfar

#include "dot_gemv_neon_body.h"
