// AVX2 kernels (+ FMA, F16C): Haswell, Zen and later.
//
// A ymm is half a block: 8 rows x 4 k. VPMADDUBSW multiplies unsigned codes with signed activations
// and adds pairs to i16, VPMADDWD with ones adds those to i32. Both steps need room, |q| <= 127:
//
//   kind      pair in i16                 i16 sum before VPMADDWD
//   i2        2 * 3 * 127 = 762           32 pairs (8 steps of 4 fields): 24,384
//   q4, q4_k  2 * 15 * 127 = 3,810        8 pairs (32 k): 30,480
//   int8      2 * 128 * 127 = 32,512      1 pair
//   int8_k    2 * 32 * 127 = 8,128        4 pairs (16 k): 32,512, since a Q6_K code is within
//   -32..31
//
// The signed kinds multiply |w| with q * sign(w): w - 128..127 fits a byte as |w| = 0..128, and q,
// never -128, can be negated. Sums beyond i16 stay below those in dot_gemv_avx512.cc.
#include <immintrin.h>

#include "check.h"
#include "dot_gemv.h"

namespace nearfar::avx2 {
namespace {

constexpr int kHalves = 8;      // halves of blocks, of 8 rows, in a panel
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

  // y = v * w.scale for the rows of half h that exist
  void store(int m, int h, __m256 v) const {
    const int64_t rows = w.rows - n - 8 * h;
    float* out = y + (i + m) * ldy + n + 8 * h;
    v = _mm256_mul_ps(v, _mm256_set1_ps(w.scale));
    if (rows >= 8) {
      _mm256_storeu_ps(out, v);
    } else if (rows > 0) {
      const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      const __m256i count = _mm256_set1_epi32(static_cast<int>(rows));
      _mm256_maskstore_ps(out, _mm256_cmpgt_epi32(count, lane), v);
    }
  }
};

template <class Kernel, int M>
inline void run_tile(const Tile& t, int64_t tokens) {
  if (tokens >= M) return Kernel::template run<M>(t);
  if constexpr (M > 1) run_tile<Kernel, M - 1>(t, tokens);
}

// Every panel is read once per Kernel::kTokens rows of x.
template <class Kernel>
inline void for_each_tile(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                          int64_t ldy) {
  NF_DCHECK(w.cols == x.cols);
  for (int64_t p = first; p < last; ++p) {
    for (int64_t i = 0; i < x.m; i += Kernel::kTokens) {
      const Tile t{w, x, w.data + p * w.panel_bytes, p * kPanelRows, i, y, ldy};
      run_tile<Kernel, Kernel::kTokens>(t, x.m - i);
    }
  }
}

inline __m256i load(const uint8_t* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}

inline __m256i broadcast4(const int8_t* q) {
  int32_t v;
  __builtin_memcpy(&v, q, 4);
  return _mm256_set1_epi32(v);
}

inline __m256 load_f16(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}

// 8 scales, each in both i16 halves of its lane, for VPMADDWD
inline __m256i load_u8_twice(const uint8_t* p) {
  const __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_or_si256(v, _mm256_slli_epi32(v, 16));
}
inline __m256i load_i8_twice(const uint8_t* p) {
  const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(v, v));
}

// i16 pairs to i32 lanes
inline __m256i add_pairs(__m256i v) { return _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }

template <int M>
using Sums = __m256i[kHalves][M];
template <int M>
using Floats = __m256[kHalves][M];

template <int M>
inline void start(Sums<M>& sum) {
  for (int h = 0; h < kHalves; ++h) {
    for (int m = 0; m < M; ++m) sum[h][m] = _mm256_setzero_si256();
  }
}

template <int M>
inline void start(Floats<M>& total) {
  for (int h = 0; h < kHalves; ++h) {
    for (int m = 0; m < M; ++m) total[h][m] = _mm256_setzero_ps();
  }
}

template <int M>
inline void store_all(const Tile& t, const Floats<M>& total) {
  for (int m = 0; m < M; ++m) {
    for (int h = 0; h < kHalves; ++h) t.store(m, h, total[h][m]);
  }
}

// ---- i2: sum q * code over 128 k, code 0..3, 16 k a step; added to sum
// ----------------------------------

template <int F>
inline __m256i i2_field(__m256i v) {
  return _mm256_and_si256(F == 0 ? v : _mm256_srli_epi16(v, 2 * F), _mm256_set1_epi8(3));
}

inline __m256i add_product(__m256i pairs, __m256i code, __m256i a) {
  return _mm256_add_epi16(pairs, _mm256_maddubs_epi16(code, a));
}

// One token: 8 accumulators and 4 broadcasts just fit the registers, the panel is read in order.
inline void dot_i2_one(const uint8_t* codes, const int8_t* q, Sums<1>& sum) {
  __m256i pairs[kHalves];
  for (int h = 0; h < kHalves; ++h) pairs[h] = _mm256_setzero_si256();
  for (int s = 0; s < 8; ++s, codes += kStep, q += 16) {
    const __m256i a0 = broadcast4(q), a1 = broadcast4(q + 4);
    const __m256i a2 = broadcast4(q + 8), a3 = broadcast4(q + 12);
#pragma GCC unroll 8
    for (int h = 0; h < kHalves; ++h) {
      const __m256i v = load(codes + 32 * h);
      pairs[h] = add_product(pairs[h], i2_field<0>(v), a0);
      pairs[h] = add_product(pairs[h], i2_field<1>(v), a1);
      pairs[h] = add_product(pairs[h], i2_field<2>(v), a2);
      pairs[h] = add_product(pairs[h], i2_field<3>(v), a3);
    }
  }
  for (int h = 0; h < kHalves; ++h) sum[h][0] = _mm256_add_epi32(sum[h][0], add_pairs(pairs[h]));
}

// M tokens: 8 rows at a time, so that M accumulators and a decoded field stay in registers.
template <int M>
inline void dot_i2(const Tile& t, const uint8_t* codes, int64_t k, Sums<M>& sum) {
  if constexpr (M == 1) {
    dot_i2_one(codes, t.q(0) + k, sum);
  } else {
    for (int h = 0; h < kHalves; ++h) {
      __m256i pairs[M];
      for (int m = 0; m < M; ++m) pairs[m] = _mm256_setzero_si256();
      for (int s = 0; s < 8; ++s) {
        const __m256i v = load(codes + s * kStep + 32 * h);
        const __m256i code[4] = {i2_field<0>(v), i2_field<1>(v), i2_field<2>(v), i2_field<3>(v)};
        for (int f = 0; f < 4; ++f) {
          for (int m = 0; m < M; ++m) {
            pairs[m] = add_product(pairs[m], code[f], broadcast4(t.q(m) + k + 16 * s + 4 * f));
          }
        }
      }
      for (int m = 0; m < M; ++m) sum[h][m] = _mm256_add_epi32(sum[h][m], add_pairs(pairs[m]));
    }
  }
}

struct I2 {
  static constexpr int kTokens = 4;

  template <int M>
  static void run(const Tile& t) {
    Sums<M> sum;
    start<M>(sum);
    const uint8_t* p = t.panel;
    for (int64_t k = 0; k < t.w.cols; k += 128, p += 8 * kStep) dot_i2<M>(t, p, k, sum);
    for (int m = 0; m < M; ++m) {
      int32_t offset = 0;
      for (int64_t j = 0; j < t.x.n_sums; ++j) offset += t.sums(m)[j];
      const __m256 s_x = _mm256_set1_ps(t.scales(m)[0]);
      for (int h = 0; h < kHalves; ++h) {
        const __m256i trits = _mm256_sub_epi32(sum[h][m], _mm256_set1_epi32(offset));
        const __m256 scale = _mm256_mul_ps(_mm256_load_ps(t.w.row_scales + t.n + 8 * h), s_x);
        t.store(m, h, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(trits)));
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
      start<M>(sum);
      dot_i2<M>(t, p + 256, j * 256, sum);
      dot_i2<M>(t, p + 256 + 8 * kStep, j * 256 + 128, sum);
      for (int h = 0; h < kHalves; ++h) {
        const __m256 scale = _mm256_load_ps(reinterpret_cast<const float*>(p) + 8 * h);
        for (int m = 0; m < M; ++m) {
          const __m256i trits = _mm256_sub_epi32(sum[h][m], _mm256_set1_epi32(t.sums(m)[j]));
          total[h][m] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(trits), total[h][m]);
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      const __m256 s_x = _mm256_set1_ps(t.scales(m)[0]);
      for (int h = 0; h < kHalves; ++h) t.store(m, h, _mm256_mul_ps(total[h][m], s_x));
    }
  }
};

// ---- q4: i16 pairs of sum q * code over 32 k for half h, code 0..15, 8 k a step
// -------------------------
template <int M>
inline void dot_q4(const Tile& t, const uint8_t* codes, int64_t k, int h, __m256i (&pairs)[M]) {
  const __m256i low = _mm256_set1_epi8(15);
  for (int m = 0; m < M; ++m) pairs[m] = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s, k += 8) {
    const uint8_t* p = codes + s * kStep + 32 * h;
    const __m256i v = load(p);
    const __m256i v_low = _mm256_and_si256(v, low);
    const __m256i v_high = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
    for (int m = 0; m < M; ++m) {
      const int8_t* q = t.q(m) + k;
      pairs[m] = _mm256_add_epi16(pairs[m], _mm256_maddubs_epi16(v_low, broadcast4(q)));
      pairs[m] = _mm256_add_epi16(pairs[m], _mm256_maddubs_epi16(v_high, broadcast4(q + 4)));
    }
  }
}

// ---- int8: |w| and the i16 pairs of q * w, 4 k a step, byte = w + 128
// -----------------------------------
inline __m256i signed_codes(const uint8_t* p) {
  return _mm256_xor_si256(load(p), _mm256_set1_epi8(static_cast<char>(128)));
}

inline __m256i signed_pairs(__m256i w, const int8_t* q) {
  return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(broadcast4(q), w));
}

// total = fma(s_w * s_x, sum, total) for half h and token m, group j
template <int M>
inline void add_group(const Tile& t, const uint8_t* p, int64_t j, int h, const __m256i (&sum)[M],
                      Floats<M>& total) {
  const __m256 s_w = load_f16(p + 16 * h);
  for (int m = 0; m < M; ++m) {
    const __m256 scale = _mm256_mul_ps(s_w, _mm256_set1_ps(t.scales(m)[j]));
    total[h][m] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(sum[m]), total[h][m]);
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
      for (int h = 0; h < kHalves; ++h) {
        __m256i sum[M];
        dot_q4<M>(t, p + 128, j * 32, h, sum);
        for (int m = 0; m < M; ++m) {
          const __m256i offset = _mm256_set1_epi32(8 * t.sums(m)[j]);
          sum[m] = _mm256_sub_epi32(add_pairs(sum[m]), offset);
        }
        add_group<M>(t, p, j, h, sum, total);
      }
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
      for (int h = 0; h < kHalves; ++h) {
        __m256i sum[M];
        for (int m = 0; m < M; ++m) sum[m] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int s = 0; s < 8; ++s) {
          const __m256i w = signed_codes(p + 128 + s * kStep + 32 * h);
          for (int m = 0; m < M; ++m) {
            const __m256i pairs = signed_pairs(w, t.q(m) + j * 32 + 4 * s);
            sum[m] = _mm256_add_epi32(sum[m], add_pairs(pairs));
          }
        }
        add_group<M>(t, p, j, h, sum, total);
      }
    }
    store_all<M>(t, total);
  }
};

struct Q4K {
  static constexpr int kTokens = 4;

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
        for (int h = 0; h < kHalves; ++h) {
          __m256i pairs[M];
          dot_q4<M>(t, p + 128, j * 256 + g * 32, h, pairs);
          const __m256i scale = load_u8_twice(p + 8 * h), min = load_u8_twice(p + 64 + 8 * h);
          for (int m = 0; m < M; ++m) {
            // The two halves of the group's sum q, |.| <= 2,032 each, as the i16 pair of a lane.
            const int32_t* q = t.sums(m) + j * 16 + 2 * g;
            const __m256i x_sum = _mm256_set1_epi32((q[0] & 0xffff) | q[1] * 65536);
            scaled[h][m] = _mm256_add_epi32(scaled[h][m], _mm256_madd_epi16(pairs[m], scale));
            mins[h][m] = _mm256_add_epi32(mins[h][m], _mm256_madd_epi16(x_sum, min));
          }
        }
      }
      for (int h = 0; h < kHalves; ++h) {
        const __m256 d_w = load_f16(d + 16 * h), dmin_w = load_f16(d + 128 + 16 * h);
        for (int m = 0; m < M; ++m) {
          const __m256 s_x = _mm256_set1_ps(t.scales(m)[j]);
          total[h][m] = _mm256_fmadd_ps(_mm256_mul_ps(d_w, s_x), _mm256_cvtepi32_ps(scaled[h][m]),
                                        total[h][m]);
          total[h][m] = _mm256_fnmadd_ps(_mm256_mul_ps(dmin_w, s_x), _mm256_cvtepi32_ps(mins[h][m]),
                                         total[h][m]);
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
        for (int h = 0; h < kHalves; ++h) {
          __m256i pairs[M];
          for (int m = 0; m < M; ++m) pairs[m] = _mm256_setzero_si256();
#pragma GCC unroll 4
          for (int s = 0; s < 4; ++s) {
            const __m256i w = signed_codes(p + 64 + s * kStep + 32 * h);
            for (int m = 0; m < M; ++m) {
              const int8_t* q = t.q(m) + j * 256 + g * 16 + 4 * s;
              pairs[m] = _mm256_add_epi16(pairs[m], signed_pairs(w, q));
            }
          }
          const __m256i scale = load_i8_twice(p + 8 * h);
          for (int m = 0; m < M; ++m) {
            scaled[h][m] = _mm256_add_epi32(scaled[h][m], _mm256_madd_epi16(pairs[m], scale));
          }
        }
      }
      for (int h = 0; h < kHalves; ++h) add_group<M>(t, d, j, h, scaled[h], total);
    }
    store_all<M>(t, total);
  }
};

// ---- floats: one chain of fma per row, in k order
// --------------------------------------------------------

inline __m256 widen(const float* p) { return _mm256_load_ps(p); }

struct F16 {
  uint16_t bits;
};
inline __m256 widen(const F16* p) { return load_f16(reinterpret_cast<const uint8_t*>(p)); }

struct BF16 {
  uint16_t bits;
};
inline __m256 widen(const BF16* p) {
  const __m128i h = _mm_load_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

template <class Value>
struct Float {
  static constexpr int kTokens = 3;

  // One token fills 8 accumulators with 64 rows; more tokens go over 32 rows twice, in 4 M
  // accumulators.
  template <int M>
  static void run(const Tile& t) {
    constexpr int kPart = M == 1 ? 8 : 4;
    const float* x[M];
    for (int m = 0; m < M; ++m) x[m] = t.x.x + (t.i + m) * t.x.x_stride;
    for (int first = 0; first < kHalves; first += kPart) {
      __m256 total[kPart][M];
      for (int h = 0; h < kPart; ++h) {
        for (int m = 0; m < M; ++m) total[h][m] = _mm256_setzero_ps();
      }
      const auto* p = reinterpret_cast<const Value*>(t.panel) + 8 * first;
      for (int64_t k = 0; k < t.w.cols; ++k, p += kPanelRows) {
        __m256 a[M];
        for (int m = 0; m < M; ++m) a[m] = _mm256_set1_ps(x[m][k]);
        for (int h = 0; h < kPart; ++h) {
          const __m256 v = widen(p + 8 * h);
          for (int m = 0; m < M; ++m) total[h][m] = _mm256_fmadd_ps(v, a[m], total[h][m]);
        }
      }
      for (int m = 0; m < M; ++m) {
        for (int h = 0; h < kPart; ++h) t.store(m, first + h, total[h][m]);
      }
    }
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

}  // namespace nearfar::avx2
