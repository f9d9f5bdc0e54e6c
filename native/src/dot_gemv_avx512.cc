// AVX-512 kernels: Ice Lake, Zen 4 and later (F BW VL VNNI VBMI).
//
// A zmm is a block of 16 rows x 4 k, an i32 lane a row. VPDPBUSD multiplies its 4 unsigned codes
// with 4 signed activations, broadcast from memory, and adds all to the lane without saturation. It
// is the bottleneck (one zmm a clock on Zen 4, two on Zen 5); everything else is there to keep it
// fed.
//
// Largest sums, |q| <= 127, all in i32 (2.1e9):
//   i2      in place, field 3, code 3: 4 * 192 * 127 = 97,536 per 16 k, so K <= 352,000;
//           pack() refuses K > 2^18
//   q4      32 * 15 * 127 = 60,960
//   q4_k    60,960 * 63 * 8 = 3.1e7, mins 63 * 32 * 127 * 8 = 2.1e6
//   int8    32 * 255 * 127 = 1.1e6, and as much again for the start -128 * sum q
//   int8_k  16 * 32 * 127 = 65,024, scaled 65,024 * 128 * 16 = 1.4e8
#include <immintrin.h>

#include "check.h"
#include "dot_gemv.h"

// GCC 12's own header leaves the operand of masked-out lanes uninitialized on purpose (its bug
// 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace nearfar::avx512 {
namespace {

constexpr int kBlocks = 4;      // of 16 rows in a panel
constexpr int64_t kStep = 256;  // bytes of 4 blocks

// One panel and M tokens: rows n.. of w, rows i.. of x.
struct Tile {
  const Panels& w;
  const Rows& x;
  const uint8_t* panel;
  int64_t n, i;
  float* y;
  int64_t ldy;

  const int8_t* q(int m) const { return x.q + (i + m) * x.q_stride; }
  const int32_t* sums(int m) const { return x.sums + (i + m) * x.n_sums; }
  const float* scales(int m) const { return x.scales + (i + m) * x.n_scales; }

  // y = v * w.scale for the rows of block b that exist
  void store(int m, int b, __m512 v) const {
    const int64_t rows = w.rows - n - 16 * b;
    if (rows <= 0) return;
    const auto mask = static_cast<__mmask16>(rows >= 16 ? 0xffff : (1 << rows) - 1);
    v = _mm512_mul_ps(v, _mm512_set1_ps(w.scale));
    _mm512_mask_storeu_ps(y + (i + m) * ldy + n + 16 * b, mask, v);
  }
};

template <class Kernel, int M>
inline void run_tile(const Tile& t, int64_t tokens) {
  if (tokens == M) return Kernel::template run<M>(t);
  if constexpr (M > 1) run_tile<Kernel, M - 1>(t, tokens);
}

// Every panel is read once per Kernel::kTokens rows of x, shared out evenly: 5 rows are 3 and 2.
template <class Kernel>
inline void for_each_tile(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                          int64_t ldy) {
  NF_DCHECK(w.cols == x.cols);
  const int64_t n_tiles = (x.m + Kernel::kTokens - 1) / Kernel::kTokens;
  for (int64_t p = first; p < last; ++p) {
    const uint8_t* panel = w.data + p * w.panel_bytes;
    for (int64_t tile = 0; tile < n_tiles; ++tile) {
      const int64_t i = tile * x.m / n_tiles, end = (tile + 1) * x.m / n_tiles;
      run_tile<Kernel, Kernel::kTokens>({w, x, panel, p * kPanelRows, i, y, ldy}, end - i);
    }
  }
}

// No software prefetch: panels are one sequential stream, and on Zen 4 prefetching 2 or 8 KiB ahead
// cost q4 a quarter and f32 a third of their speed from memory.
inline __m512i load(const uint8_t* p) { return _mm512_load_si512(p); }

inline __m512i broadcast4(const int8_t* q) {
  int32_t v;
  __builtin_memcpy(&v, q, 4);
  return _mm512_set1_epi32(v);
}

inline __m512 load_f16(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512i load_u8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m512i load_i8(const uint8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}

template <int M>
using Sums = __m512i[kBlocks][M];
template <int M>
using Floats = __m512[kBlocks][M];

template <int M>
inline void start(Sums<M>& sum) {
  for (int b = 0; b < kBlocks; ++b) {
    for (int m = 0; m < M; ++m) sum[b][m] = _mm512_setzero_si512();
  }
}

// sum[b][m] = start[m], a multiple of sum q that stands for the offset of the codes
template <int M>
inline void start(Sums<M>& sum, const int32_t (&start)[M]) {
  for (int b = 0; b < kBlocks; ++b) {
    for (int m = 0; m < M; ++m) sum[b][m] = _mm512_set1_epi32(start[m]);
  }
}

template <int M>
inline void start(Floats<M>& total) {
  for (int b = 0; b < kBlocks; ++b) {
    for (int m = 0; m < M; ++m) total[b][m] = _mm512_setzero_ps();
  }
}

// ---- i2: sum q * code, code 0..3, 16 k a step ----

// One token. The fields are masked in place and not shifted: accumulator f collects 4^f times its
// sum, the arithmetic shift at the end is exact. 8 operations per 256 weights; 16 accumulators hide
// the latency.
inline void dot_i2_one(const uint8_t* codes, const int8_t* q, int64_t steps, Sums<1>& sum) {
  const __m512i mask[4] = {_mm512_set1_epi8(3), _mm512_set1_epi8(12), _mm512_set1_epi8(48),
                           _mm512_set1_epi8(static_cast<char>(192))};
  __m512i field[kBlocks][4];
  for (int b = 0; b < kBlocks; ++b) {
    for (int f = 0; f < 4; ++f) field[b][f] = _mm512_setzero_si512();
  }
  for (int64_t s = 0; s < steps; ++s, codes += kStep, q += 16) {
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const __m512i v = load(codes + 64 * b);
#pragma GCC unroll 4
      for (int f = 0; f < 4; ++f) {
        field[b][f] =
            _mm512_dpbusd_epi32(field[b][f], _mm512_and_si512(v, mask[f]), broadcast4(q + 4 * f));
      }
    }
  }
  for (int b = 0; b < kBlocks; ++b) {
    const __m512i low = _mm512_add_epi32(field[b][0], _mm512_srai_epi32(field[b][1], 2));
    const __m512i high =
        _mm512_add_epi32(_mm512_srai_epi32(field[b][2], 4), _mm512_srai_epi32(field[b][3], 6));
    sum[b][0] = _mm512_add_epi32(low, high);
  }
}

// M tokens: the fields are shifted down once and used M times; 4 M accumulators.
template <int M>
inline void dot_i2(const Tile& t, const uint8_t* codes, int64_t k, int64_t steps, Sums<M>& sum) {
  if constexpr (M == 1) {
    dot_i2_one(codes, t.q(0) + k, steps, sum);
  } else {
    const __m512i three = _mm512_set1_epi8(3);
    start<M>(sum);
    for (int64_t s = 0; s < steps; ++s, codes += kStep, k += 16) {
      __m512i v[kBlocks];
      for (int b = 0; b < kBlocks; ++b) v[b] = load(codes + 64 * b);
#pragma GCC unroll 4
      for (int f = 0; f < 4; ++f) {
        __m512i a[M];
        for (int m = 0; m < M; ++m) a[m] = broadcast4(t.q(m) + k + 4 * f);
        for (int b = 0; b < kBlocks; ++b) {
          const __m512i code = _mm512_and_si512(_mm512_srli_epi16(v[b], 2 * f), three);
          for (int m = 0; m < M; ++m) sum[b][m] = _mm512_dpbusd_epi32(sum[b][m], code, a[m]);
        }
      }
    }
  }
}

struct I2 {
  static constexpr int kTokens = 4;

  template <int M>
  static void run(const Tile& t) {
    Sums<M> sum;
    dot_i2<M>(t, t.panel, 0, t.w.cols / 16, sum);
    for (int m = 0; m < M; ++m) {
      int32_t offset = 0;
      for (int64_t j = 0; j < t.x.n_sums; ++j) offset += t.sums(m)[j];
      const __m512 s_x = _mm512_set1_ps(t.scales(m)[0]);
      for (int b = 0; b < kBlocks; ++b) {
        const __m512i trits = _mm512_sub_epi32(sum[b][m], _mm512_set1_epi32(offset));
        const __m512 scale = _mm512_mul_ps(_mm512_load_ps(t.w.row_scales + t.n + 16 * b), s_x);
        t.store(m, b, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(trits)));
      }
    }
  }
};

struct I2Blocks {
  static constexpr int kTokens = 4;

  template <int M>
  static void run(const Tile& t) {
    Floats<M> total;
    start<M>(total);
    const uint8_t* p = t.panel;
    for (int64_t j = 0; j < t.w.cols / 256; ++j, p += 256 + 16 * kStep) {
      Sums<M> sum;
      dot_i2<M>(t, p + 256, j * 256, 16, sum);
      for (int b = 0; b < kBlocks; ++b) {
        const __m512 scale = _mm512_load_ps(reinterpret_cast<const float*>(p) + 16 * b);
        for (int m = 0; m < M; ++m) {
          const __m512i trits = _mm512_sub_epi32(sum[b][m], _mm512_set1_epi32(t.sums(m)[j]));
          total[b][m] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(trits), total[b][m]);
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int b = 0; b < kBlocks; ++b) {
        t.store(m, b, _mm512_mul_ps(total[b][m], _mm512_set1_ps(t.scales(m)[0])));
      }
    }
  }
};

// ---- q4: sum q * code over 32 k, code 0..15, 8 k a step; added to sum ----
template <int M>
inline void dot_q4(const Tile& t, const uint8_t* codes, int64_t k, Sums<M>& sum) {
  const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s, codes += kStep, k += 8) {
    __m512i a_low[M], a_high[M];
    for (int m = 0; m < M; ++m) {
      a_low[m] = broadcast4(t.q(m) + k);
      a_high[m] = broadcast4(t.q(m) + k + 4);
    }
    for (int b = 0; b < kBlocks; ++b) {
      const __m512i v = load(codes + 64 * b);
      const __m512i v_low = _mm512_and_si512(v, low);
      const __m512i v_high = _mm512_and_si512(_mm512_srli_epi16(v, 4), low);
      for (int m = 0; m < M; ++m) {
        sum[b][m] = _mm512_dpbusd_epi32(sum[b][m], v_low, a_low[m]);
        sum[b][m] = _mm512_dpbusd_epi32(sum[b][m], v_high, a_high[m]);
      }
    }
  }
}

// ---- int8: sum q * byte over 4 * kSteps k; added to sum ----
template <int M, int kSteps>
inline void dot_int8(const Tile& t, const uint8_t* codes, int64_t k, Sums<M>& sum) {
#pragma GCC unroll 8
  for (int s = 0; s < kSteps; ++s, codes += kStep, k += 4) {
    __m512i a[M];
    for (int m = 0; m < M; ++m) a[m] = broadcast4(t.q(m) + k);
    for (int b = 0; b < kBlocks; ++b) {
      const __m512i v = load(codes + 64 * b);
      for (int m = 0; m < M; ++m) sum[b][m] = _mm512_dpbusd_epi32(sum[b][m], v, a[m]);
    }
  }
}

// total[b][m] += (s_w * s_x) * sum, the group j of 32 whose 64 f16 scales lie at p
template <int M>
inline void add_group(const Tile& t, const uint8_t* p, int64_t j, const Sums<M>& sum,
                      Floats<M>& total) {
  for (int b = 0; b < kBlocks; ++b) {
    const __m512 s_w = load_f16(p + 32 * b);
    for (int m = 0; m < M; ++m) {
      const __m512 scale = _mm512_mul_ps(s_w, _mm512_set1_ps(t.scales(m)[j]));
      total[b][m] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sum[b][m]), total[b][m]);
    }
  }
}

template <int M>
inline void store_all(const Tile& t, const Floats<M>& total) {
  for (int m = 0; m < M; ++m) {
    for (int b = 0; b < kBlocks; ++b) t.store(m, b, total[b][m]);
  }
}

struct Q4 {
  static constexpr int kTokens = 4;

  template <int M>
  static void run(const Tile& t) {
    Floats<M> total;
    start<M>(total);
    const uint8_t* p = t.panel;
    for (int64_t j = 0; j < t.w.cols / 32; ++j, p += 128 + 4 * kStep) {
      int32_t offset[M];
      for (int m = 0; m < M; ++m) offset[m] = -8 * t.sums(m)[j];
      Sums<M> sum;
      start<M>(sum, offset);
      dot_q4<M>(t, p + 128, j * 32, sum);
      add_group<M>(t, p, j, sum, total);
    }
    store_all<M>(t, total);
  }
};

struct Int8 {
  static constexpr int kTokens = 4;

  template <int M>
  static void run(const Tile& t) {
    Floats<M> total;
    start<M>(total);
    const uint8_t* p = t.panel;
    for (int64_t j = 0; j < t.w.cols / 32; ++j, p += 128 + 8 * kStep) {
      int32_t offset[M];
      for (int m = 0; m < M; ++m) offset[m] = -128 * t.sums(m)[j];
      Sums<M> sum;
      start<M>(sum, offset);
      dot_int8<M, 8>(t, p + 128, j * 32, sum);
      add_group<M>(t, p, j, sum, total);
    }
    store_all<M>(t, total);
  }
};

struct Q4K {
  static constexpr int kTokens = 2;  // 16 M registers of sums and floats

  template <int M>
  static void run(const Tile& t) {
    Floats<M> total;
    start<M>(total);
    const uint8_t* p = t.panel;
    for (int64_t j = 0; j < t.w.cols / 256; ++j) {
      const uint8_t* d = p;
      Sums<M> scaled, mins;
      start<M>(scaled);
      start<M>(mins);
      p += 256;
      for (int64_t g = 0; g < 8; ++g, p += 128 + 4 * kStep) {
        Sums<M> sum;
        start<M>(sum);
        dot_q4<M>(t, p + 128, j * 256 + g * 32, sum);
        for (int b = 0; b < kBlocks; ++b) {
          const __m512i scale = load_u8(p + 16 * b), min = load_u8(p + 64 + 16 * b);
          for (int m = 0; m < M; ++m) {
            const int32_t* q_sum = t.sums(m) + j * 16 + 2 * g;
            const __m512i x_sum = _mm512_set1_epi32(q_sum[0] + q_sum[1]);
            scaled[b][m] = _mm512_add_epi32(scaled[b][m], _mm512_mullo_epi32(scale, sum[b][m]));
            mins[b][m] = _mm512_add_epi32(mins[b][m], _mm512_mullo_epi32(min, x_sum));
          }
        }
      }
      for (int b = 0; b < kBlocks; ++b) {
        const __m512 d_w = load_f16(d + 32 * b), dmin_w = load_f16(d + 128 + 32 * b);
        for (int m = 0; m < M; ++m) {
          const __m512 s_x = _mm512_set1_ps(t.scales(m)[j]);
          total[b][m] = _mm512_fmadd_ps(_mm512_mul_ps(d_w, s_x), _mm512_cvtepi32_ps(scaled[b][m]),
                                        total[b][m]);
          total[b][m] = _mm512_fnmadd_ps(_mm512_mul_ps(dmin_w, s_x), _mm512_cvtepi32_ps(mins[b][m]),
                                         total[b][m]);
        }
      }
    }
    store_all<M>(t, total);
  }
};

struct Int8K {
  static constexpr int kTokens = 4;

  template <int M>
  static void run(const Tile& t) {
    Floats<M> total;
    start<M>(total);
    const uint8_t* p = t.panel;
    for (int64_t j = 0; j < t.w.cols / 256; ++j) {
      const uint8_t* d = p;
      Sums<M> scaled;
      start<M>(scaled);
      p += 128;
      for (int64_t g = 0; g < 16; ++g, p += 64 + 4 * kStep) {
        int32_t offset[M];
        for (int m = 0; m < M; ++m) offset[m] = -128 * t.sums(m)[j * 16 + g];
        Sums<M> sum;
        start<M>(sum, offset);
        dot_int8<M, 4>(t, p + 64, j * 256 + g * 16, sum);
        for (int b = 0; b < kBlocks; ++b) {
          const __m512i scale = load_i8(p + 16 * b);
          for (int m = 0; m < M; ++m) {
            scaled[b][m] = _mm512_add_epi32(scaled[b][m], _mm512_mullo_epi32(scale, sum[b][m]));
          }
        }
      }
      add_group<M>(t, d, j, scaled, total);
    }
    store_all<M>(t, total);
  }
};

// ---- floats: one chain of fma per row, in k order ----

inline __m512 widen(const float* p) { return _mm512_load_ps(p); }

struct F16 {
  uint16_t bits;
};
inline __m512 widen(const F16* p) { return load_f16(reinterpret_cast<const uint8_t*>(p)); }

struct BF16 {
  uint16_t bits;
};
inline __m512 widen(const BF16* p) {
  const __m256i h = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

template <class Value>
struct Float {
  static constexpr int kTokens = 6;

  template <int M>
  static void run(const Tile& t) {
    Floats<M> total;
    start<M>(total);
    const float* x[M];
    for (int m = 0; m < M; ++m) x[m] = t.x.x + (t.i + m) * t.x.x_stride;
    const auto* p = reinterpret_cast<const Value*>(t.panel);
    for (int64_t k = 0; k < t.w.cols; ++k, p += kPanelRows) {
      __m512 v[kBlocks];
      for (int b = 0; b < kBlocks; ++b) v[b] = widen(p + 16 * b);
      for (int m = 0; m < M; ++m) {
        const __m512 a = _mm512_set1_ps(x[m][k]);
        for (int b = 0; b < kBlocks; ++b) total[b][m] = _mm512_fmadd_ps(v[b], a, total[b][m]);
      }
    }
    store_all<M>(t, total);
  }
};

}  // namespace

#define NF_KERNEL(name, Kernel)                                                                   \
  void name(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y, int64_t ldy) { \
    for_each_tile<Kernel>(w, x, first, last, y, ldy);                                             \
  }

NF_KERNEL(matmul_f32, Float<float>)
NF_KERNEL(matmul_f16, Float<F16>)
NF_KERNEL(matmul_bf16, Float<BF16>)
NF_KERNEL(matmul_i2, I2)
NF_KERNEL(matmul_i2_blocks, I2Blocks)
NF_KERNEL(matmul_q4, Q4)
NF_KERNEL(matmul_q4_k, Q4K)
NF_KERNEL(matmul_int8, Int8)
NF_KERNEL(matmul_int8_k, Int8K)

}  // namespace nearfar::avx512
