// Plain NEON kernels: every 64-bit ARM, so also those without dot products (Cortex-A53, A72). Float
// kinds of all ARM levels.
//
// SMLAL multiplies 8 codes with 8 activations and adds them to i16; SADALP adds neighbouring pairs
// of those to i32. |q| <= 127 and a lane takes one product of each 4 k before it is widened:
//
//   codes up to 63   4 * 63 * 127 = 32,004 after 16 k
//   codes of int8    2 * 128 * 127 = 32,512 after 8 k
#include <arm_neon.h>

#include "check.h"
#include "dot_gemv.h"

#define NF_LEVEL neon

namespace nearfar {
namespace {

constexpr bool kSignedCodes = true;

template <int M>
struct Sums {
  // Two sums a row, one over the k 0, 1 of each 4 and one over 2, 3.
  int32x4_t rows01[M], rows23[M];

  void clear() {
    for (int m = 0; m < M; ++m) rows01[m] = rows23[m] = vdupq_n_s32(0);
  }

  template <int kMaxCode>
  void add(const uint8x16_t (&code)[4], const int8_t* q, int64_t stride) {
    constexpr int kDepth = kMaxCode <= 63 ? 4 : 2;
    for (int m = 0; m < M; ++m, q += stride) {
      for (int i = 0; i < 4; i += kDepth) {
        int16x8_t sum01 = vdupq_n_s16(0), sum23 = sum01;
        for (int j = i; j < i + kDepth; ++j) {
          const int8x16_t w = vreinterpretq_s8_u8(code[j]), a = broadcast4(q + 4 * j);
          sum01 = vmlal_s8(sum01, vget_low_s8(w), vget_low_s8(a));
          sum23 = vmlal_high_s8(sum23, w, a);
        }
        rows01[m] = vpadalq_s16(rows01[m], sum01);
        rows23[m] = vpadalq_s16(rows23[m], sum23);
      }
    }
  }

  int32x4_t of(int m) const { return vpaddq_s32(rows01[m], rows23[m]); }

 private:
  static int8x16_t broadcast4(const int8_t* q) {
    int32_t v;
    __builtin_memcpy(&v, q, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(v));
  }
};

}  // namespace
}  // namespace nearfar

#include "dot_gemv_neon_body.h"

namespace nearfar {
namespace {

// ---- floats: one chain of fma per row, in k order ----

inline float32x4_t widen(const float* p) { return vld1q_f32(p); }

struct F16 {
  uint16_t bits;
};
inline float32x4_t widen(const F16* p) { return load_f16(reinterpret_cast<const uint8_t*>(p)); }

struct BF16 {
  uint16_t bits;
};
inline float32x4_t widen(const BF16* p) {
  const uint16x4_t half = vreinterpret_u16_u8(vld1_u8(reinterpret_cast<const uint8_t*>(p)));
  return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

constexpr int64_t kRun = 64;  // k of which 64 rows stay in L1

template <class Value>
struct Float {
  // 16 accumulators: 64 rows of one token, 32 of two, 16 of three or four.
  template <int M>
  static void run(const Tile& t) {
    constexpr int kPart = M == 1 ? 16 : M == 2 ? 8 : 4;
    Floats<M> total = {};
    for (int64_t k = 0; k < t.w.cols; k += kRun) {
      const int64_t end = k + kRun < t.w.cols ? k + kRun : t.w.cols;
      for (int h = 0; h < kQuarters; h += kPart) add<M, kPart>(t, h, k, end, &total[h]);
    }
    store_all<M>(t, total);
  }

  template <int M, int kPart>
  static void add(const Tile& t, int first, int64_t k, int64_t end, float32x4_t (*total)[M]) {
    float32x4_t sum[kPart][M];
    __builtin_memcpy(sum, total, sizeof sum);
    const float* x = t.x.x + t.i * t.x.x_stride;
    const auto* p = reinterpret_cast<const Value*>(t.panel) + k * kPanelRows + 4 * first;
    for (; k < end; ++k, p += kPanelRows) {
      for (int h = 0; h < kPart; ++h) {
        const float32x4_t v = widen(p + 4 * h);
        for (int m = 0; m < M; ++m) sum[h][m] = vfmaq_n_f32(sum[h][m], v, x[m * t.x.x_stride + k]);
      }
    }
    __builtin_memcpy(total, sum, sizeof sum);
  }
};

}  // namespace

void neon::matmul_f32(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                      int64_t ldy) {
  matmul<Float<float>>(w, x, first, last, y, ldy);
}
void neon::matmul_f16(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                      int64_t ldy) {
  matmul<Float<F16>>(w, x, first, last, y, ldy);
}
void neon::matmul_bf16(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                       int64_t ldy) {
  matmul<Float<BF16>>(w, x, first, last, y, ldy);
}

}  // namespace nearfar
