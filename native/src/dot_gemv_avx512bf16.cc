// Products of bf16 where the CPU has them (AVX512_BF16: Cooper Lake, Zen 4 and later); all else is
// that of AVX-512.
//
// VDPBF16PS adds two products a lane, and rounds otherwise than a chain of fma: the bits are this
// level's own, and still those of the row alone.
#include <immintrin.h>

#include "dot_gemv.h"

namespace nearfar {
namespace {

constexpr int64_t kStep = 256;  // bytes of 2 k x 64 rows
constexpr int kBlocks = 4;

template <int M>
void add_rows(const Panels& w, const Rows& x, int64_t panel, int64_t first, float* y, int64_t ldy) {
  __m512 total[kBlocks][M];
  for (int b = 0; b < kBlocks; ++b) {
    for (int m = 0; m < M; ++m) total[b][m] = _mm512_setzero_ps();
  }
  const uint8_t* p = w.data + panel * w.panel_bytes;
  for (int64_t k = 0; k < w.cols; k += 2, p += kStep) {
    __m512bh v[kBlocks];
    for (int b = 0; b < kBlocks; ++b) {
      _mm_prefetch(reinterpret_cast<const char*>(p + w.ahead + 64 * b), _MM_HINT_T0);
      v[b] = (__m512bh)_mm512_load_si512(p + 64 * b);
    }
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      __builtin_memcpy(&pair, x.bf16 + (first + m) * x.bf16_stride + k, 4);
      const auto a = (__m512bh)_mm512_set1_epi32(pair);
      for (int b = 0; b < kBlocks; ++b) total[b][m] = _mm512_dpbf16_ps(total[b][m], v[b], a);
    }
  }
  for (int b = 0; b < kBlocks; ++b) {
    const int64_t n = panel * 64 + 16 * b, rows = w.rows - n;
    if (rows <= 0) continue;
    const auto mask = static_cast<__mmask16>(rows >= 16 ? 0xffff : (1 << rows) - 1);
    for (int m = 0; m < M; ++m) {
      const __m512 v = _mm512_mul_ps(total[b][m], _mm512_set1_ps(w.scale));
      _mm512_mask_storeu_ps(y + (first + m) * ldy + n, mask, v);
    }
  }
}

}  // namespace

void avx512bf16::matmul_bf16_dot(const Panels& w, const Rows& x, int64_t first, int64_t last,
                                 float* y, int64_t ldy) {
  for (int64_t p = first; p < last; ++p) {
    int64_t i = 0;
    for (; i + 6 <= x.m; i += 6) add_rows<6>(w, x, p, i, y, ldy);
    for (; i + 3 <= x.m; i += 3) add_rows<3>(w, x, p, i, y, ldy);
    for (; i < x.m; ++i) add_rows<1>(w, x, p, i, y, ldy);
  }
}

}  // namespace nearfar
