// AVX2 kernels (+ FMA, F16C): Haswell, Zen and later.
//
// A ymm is half a block: 8 rows x 4 k. VPMADDUBSW multiplies unsigned codes with signed activations
// and adds pairs to i16, VPMADDWD with ones adds those to i32. Both steps need room, |q| <= 127:
//
//   kind      pair in i16                 i16 sum before VPMADDWD
//   i2        2 * 3 * 127 = 762           32 pairs (8 steps of 4 fields): 24,384
//   q4, q4_k  2 * 15 * 127 = 3,810        8 pairs (32 k): 30,480
//   int8      2 * 128 * 127 = 32,512      1 pair
//   int8_k    2 * 32 * 127 = 8,128        4 pairs (16 k): 32,512; Q6_K codes are -32..31
//
// The signed kinds multiply |w| with q * sign(w): |w| = 0..128 fits an unsigned byte, and q, never
// -128, can be negated. Sums beyond i16 stay below those in dot_gemv_avx512.cc.
#include <immintrin.h>

#include "check.h"
#include "dot_gemv.h"

namespace nearfar::avx2 {
namespace {

constexpr int kHalves = 8;      // halves of blocks, of 8 rows, in a panel
constexpr int64_t kStep = 256;  // bytes of 4 blocks
constexpr int kTokens = 9;      // rows of x that share a reading of a panel

// One panel and up to kTokens tokens: rows n.. of w, rows i.. of x.
struct Tile {
  const Panels& w;
  const Rows& x;
  const uint8_t* panel;
  int64_t n, i;
  int tokens;
  float* y;
  int64_t ldy;

  const int8_t* q(int m) const { return x.q + (i + m) * x.q_stride; }
  const int32_t* sums(int m) const { return x.sums + (i + m) * x.n_sums; }
  const float* scales(int m) const { return x.scales + (i + m) * x.n_scales; }

  // y = v * w.scale for the rows of half h that exist
  void store(int m, int h, __m256 v) const {
    const int64_t rows = w.rows - n - 8 * h;
    if (rows <= 0) return;
    float* out = y + (i + m) * ldy + n + 8 * h;
    v = _mm256_mul_ps(v, _mm256_set1_ps(w.scale));
    if (rows >= 8) {
      _mm256_storeu_ps(out, v);
    } else {
      const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      const __m256i count = _mm256_set1_epi32(static_cast<int>(rows));
      _mm256_maskstore_ps(out, _mm256_cmpgt_epi32(count, lane), v);
    }
  }
};

// Every panel is read once per kTokens rows of x.
template <class Kernel>
inline void for_each_tile(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                          int64_t ldy) {
  NF_DCHECK(w.cols == x.cols);
  for (int64_t p = first; p < last; ++p) {
    for (int64_t i = 0; i < x.m; i += kTokens) {
      const int tokens = static_cast<int>(x.m - i < kTokens ? x.m - i : kTokens);
      Kernel::run({w, x, w.data + p * w.panel_bytes, p * kPanelRows, i, tokens, y, ldy});
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

// 64 rows of one token. The functions dot_* fill one for a run of k short enough for their i16
// sums: 8 accumulators and the broadcasts fit the 16 registers, and the panel is read in order.
// With more tokens the run is decoded again for each, out of L1: sharing it costs as much in
// spilled accumulators. (An unrolled run would be hoisted out of the loop over tokens, onto the
// stack: hence unroll 1.)
using Sums = __m256i[kHalves];
using Floats = __m256[kHalves];

inline void clear(Sums& sum) {
  for (__m256i& s : sum) s = _mm256_setzero_si256();
}
inline void clear(Floats& total) {
  for (__m256& f : total) f = _mm256_setzero_ps();
}

// i16 pairs to i32 lanes
inline void add_pairs(Sums& sum) {
  for (__m256i& s : sum) s = _mm256_madd_epi16(s, _mm256_set1_epi16(1));
}

inline __m256i add_product(__m256i pairs, __m256i code, __m256i a) {
  return _mm256_add_epi16(pairs, _mm256_maddubs_epi16(code, a));
}

template <int kShift, int kMask>
inline __m256i field(__m256i v) {
  return _mm256_and_si256(kShift == 0 ? v : _mm256_srli_epi16(v, kShift), _mm256_set1_epi8(kMask));
}

// i2: sum q * code over 128 k, code 0..3, 16 k a step
inline void dot_i2(const uint8_t* codes, const int8_t* q, Sums& sum) {
  clear(sum);
#pragma GCC unroll 1
  for (int s = 0; s < 8; ++s, codes += kStep, q += 16) {
    const __m256i a0 = broadcast4(q), a1 = broadcast4(q + 4);
    const __m256i a2 = broadcast4(q + 8), a3 = broadcast4(q + 12);
#pragma GCC unroll 8
    for (int h = 0; h < kHalves; ++h) {
      const __m256i v = load(codes + 32 * h);
      sum[h] = add_product(sum[h], field<0, 3>(v), a0);
      sum[h] = add_product(sum[h], field<2, 3>(v), a1);
      sum[h] = add_product(sum[h], field<4, 3>(v), a2);
      sum[h] = add_product(sum[h], field<6, 3>(v), a3);
    }
  }
  add_pairs(sum);
}

// q4: i16 pairs of sum q * code over 32 k, code 0..15, 8 k a step
inline void dot_q4(const uint8_t* codes, const int8_t* q, Sums& pairs) {
  clear(pairs);
#pragma GCC unroll 1
  for (int s = 0; s < 4; ++s, codes += kStep, q += 8) {
    const __m256i a0 = broadcast4(q), a1 = broadcast4(q + 4);
#pragma GCC unroll 8
    for (int h = 0; h < kHalves; ++h) {
      const __m256i v = load(codes + 32 * h);
      pairs[h] = add_product(pairs[h], field<0, 15>(v), a0);
      pairs[h] = add_product(pairs[h], field<4, 15>(v), a1);
    }
  }
}

// int8: the i16 pairs of q * w of one step, 4 k, byte = w + 128
inline __m256i signed_pairs(const uint8_t* codes, __m256i a) {
  const __m256i w = _mm256_xor_si256(load(codes), _mm256_set1_epi8(static_cast<char>(128)));
  return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
}

// int8: sum q * w over 32 k, 4 k a step, any w
inline void dot_int8(const uint8_t* codes, const int8_t* q, Sums& sum) {
  clear(sum);
#pragma GCC unroll 1
  for (int s = 0; s < 8; ++s, codes += kStep, q += 4) {
    const __m256i a = broadcast4(q);
#pragma GCC unroll 8
    for (int h = 0; h < kHalves; ++h) {
      const __m256i pairs = signed_pairs(codes + 32 * h, a);
      sum[h] = _mm256_add_epi32(sum[h], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
  }
}

// int8: i16 pairs of sum q * w over 16 k, 4 k a step, |w| <= 32
inline void dot_int6(const uint8_t* codes, const int8_t* q, Sums& pairs) {
  clear(pairs);
#pragma GCC unroll 1
  for (int s = 0; s < 4; ++s, codes += kStep, q += 4) {
    const __m256i a = broadcast4(q);
#pragma GCC unroll 8
    for (int h = 0; h < kHalves; ++h) {
      pairs[h] = _mm256_add_epi16(pairs[h], signed_pairs(codes + 32 * h, a));
    }
  }
}

inline void add(Sums& sum, const Sums& more) {
  for (int h = 0; h < kHalves; ++h) sum[h] = _mm256_add_epi32(sum[h], more[h]);
}

inline void subtract(Sums& sum, int32_t offset) {
  for (__m256i& s : sum) s = _mm256_sub_epi32(s, _mm256_set1_epi32(offset));
}

// total = fma(s_w * s_x, sum, total), the 64 f16 scales s_w at p
inline void add_scaled(const uint8_t* p, float s_x, const Sums& sum, Floats& total) {
  for (int h = 0; h < kHalves; ++h) {
    const __m256 scale = _mm256_mul_ps(load_f16(p + 16 * h), _mm256_set1_ps(s_x));
    total[h] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(sum[h]), total[h]);
  }
}

// total = fma(-(s_w * s_x), sum, total)
inline void subtract_scaled(const uint8_t* p, float s_x, const Sums& sum, Floats& total) {
  for (int h = 0; h < kHalves; ++h) {
    const __m256 scale = _mm256_mul_ps(load_f16(p + 16 * h), _mm256_set1_ps(s_x));
    total[h] = _mm256_fnmadd_ps(scale, _mm256_cvtepi32_ps(sum[h]), total[h]);
  }
}

inline void store_all(const Tile& t, const Floats (&total)[kTokens]) {
  for (int m = 0; m < t.tokens; ++m) {
    for (int h = 0; h < kHalves; ++h) t.store(m, h, total[m][h]);
  }
}

struct I2 {
  static void run(const Tile& t) {
    Sums sum[kTokens], run;
    for (int m = 0; m < t.tokens; ++m) clear(sum[m]);
    const uint8_t* p = t.panel;
    for (int64_t k = 0; k < t.w.cols; k += 128, p += 8 * kStep) {
      for (int m = 0; m < t.tokens; ++m) {
        dot_i2(p, t.q(m) + k, run);
        add(sum[m], run);
      }
    }
    for (int m = 0; m < t.tokens; ++m) {
      for (int64_t j = 0; j < t.x.n_sums; ++j) subtract(sum[m], t.sums(m)[j]);
      const __m256 s_x = _mm256_set1_ps(t.scales(m)[0]);
      for (int h = 0; h < kHalves; ++h) {
        const __m256 scale = _mm256_mul_ps(_mm256_load_ps(t.w.row_scales + t.n + 8 * h), s_x);
        t.store(m, h, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(sum[m][h])));
      }
    }
  }
};

struct I2Blocks {
  static void run(const Tile& t) {
    Floats total[kTokens];
    for (int m = 0; m < t.tokens; ++m) clear(total[m]);
    const uint8_t* p = t.panel;
    for (int64_t j = 0; j < t.w.cols / 256; ++j, p += 256 + 16 * kStep) {
      for (int m = 0; m < t.tokens; ++m) {
        Sums sum, run;
        dot_i2(p + 256, t.q(m) + j * 256, sum);
        dot_i2(p + 256 + 8 * kStep, t.q(m) + j * 256 + 128, run);
        add(sum, run);
        subtract(sum, t.sums(m)[j]);
        for (int h = 0; h < kHalves; ++h) {
          const __m256 scale = _mm256_load_ps(reinterpret_cast<const float*>(p) + 8 * h);
          total[m][h] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(sum[h]), total[m][h]);
        }
      }
    }
    for (int m = 0; m < t.tokens; ++m) {
      const __m256 s_x = _mm256_set1_ps(t.scales(m)[0]);
      for (__m256& f : total[m]) f = _mm256_mul_ps(f, s_x);
    }
    store_all(t, total);
  }
};

struct Q4 {
  static void run(const Tile& t) {
    Floats total[kTokens];
    for (int m = 0; m < t.tokens; ++m) clear(total[m]);
    const uint8_t* p = t.panel;
    for (int64_t j = 0; j < t.w.cols / 32; ++j, p += 128 + 4 * kStep) {
      for (int m = 0; m < t.tokens; ++m) {
        Sums sum;
        dot_q4(p + 128, t.q(m) + j * 32, sum);
        add_pairs(sum);
        subtract(sum, 8 * t.sums(m)[j]);
        add_scaled(p, t.scales(m)[j], sum, total[m]);
      }
    }
    store_all(t, total);
  }
};

struct Int8 {
  static void run(const Tile& t) {
    Floats total[kTokens];
    for (int m = 0; m < t.tokens; ++m) clear(total[m]);
    const uint8_t* p = t.panel;
    for (int64_t j = 0; j < t.w.cols / 32; ++j, p += 128 + 8 * kStep) {
      for (int m = 0; m < t.tokens; ++m) {
        Sums sum;
        dot_int8(p + 128, t.q(m) + j * 32, sum);
        add_scaled(p, t.scales(m)[j], sum, total[m]);
      }
    }
    store_all(t, total);
  }
};

struct Q4K {
  static void run(const Tile& t) {
    Floats total[kTokens];
    for (int m = 0; m < t.tokens; ++m) clear(total[m]);
    const uint8_t* p = t.panel;
    for (int64_t j = 0; j < t.w.cols / 256; ++j, p += 256 + 8 * (128 + 4 * kStep)) {
      for (int m = 0; m < t.tokens; ++m) {
        Sums scaled, mins;
        clear(scaled);
        clear(mins);
        for (int64_t g = 0; g < 8; ++g) {
          const uint8_t* group = p + 256 + g * (128 + 4 * kStep);
          Sums pairs;
          dot_q4(group + 128, t.q(m) + j * 256 + g * 32, pairs);
          // The two halves of the group's sum q, at most 16 * 127 each, as the i16 pair of a lane.
          const int32_t* q_sum = t.sums(m) + j * 16 + 2 * g;
          const __m256i x_sum = _mm256_set1_epi32((q_sum[0] & 0xffff) | q_sum[1] * 65536);
          for (int h = 0; h < kHalves; ++h) {
            const __m256i scale = load_u8_twice(group + 8 * h);
            const __m256i min = load_u8_twice(group + 64 + 8 * h);
            scaled[h] = _mm256_add_epi32(scaled[h], _mm256_madd_epi16(pairs[h], scale));
            mins[h] = _mm256_add_epi32(mins[h], _mm256_madd_epi16(x_sum, min));
          }
        }
        add_scaled(p, t.scales(m)[j], scaled, total[m]);
        subtract_scaled(p + 128, t.scales(m)[j], mins, total[m]);
      }
    }
    store_all(t, total);
  }
};

struct Int8K {
  static void run(const Tile& t) {
    Floats total[kTokens];
    for (int m = 0; m < t.tokens; ++m) clear(total[m]);
    const uint8_t* p = t.panel;
    for (int64_t j = 0; j < t.w.cols / 256; ++j, p += 128 + 16 * (64 + 4 * kStep)) {
      for (int m = 0; m < t.tokens; ++m) {
        Sums scaled;
        clear(scaled);
        for (int64_t g = 0; g < 16; ++g) {
          const uint8_t* group = p + 128 + g * (64 + 4 * kStep);
          Sums pairs;
          dot_int6(group + 64, t.q(m) + j * 256 + g * 16, pairs);
          for (int h = 0; h < kHalves; ++h) {
            const __m256i scale = load_i8_twice(group + 8 * h);
            scaled[h] = _mm256_add_epi32(scaled[h], _mm256_madd_epi16(pairs[h], scale));
          }
        }
        add_scaled(p, t.scales(m)[j], scaled, total[m]);
      }
    }
    store_all(t, total);
  }
};

// ---- floats: one chain of fma per row, in k order ----

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

constexpr int64_t kRun = 64;  // k of which 64 rows stay in L1 for all tokens

// total[m..m + M) += the kPart halves from `first` on, over the k of a run
template <class Value, int kPart, int M>
inline void add_float(const Tile& t, int first, int m, int64_t k, Floats* total) {
  const int64_t end = k + kRun < t.w.cols ? k + kRun : t.w.cols;
  __m256 sum[kPart][M];
  for (int h = 0; h < kPart; ++h) {
    for (int i = 0; i < M; ++i) sum[h][i] = total[m + i][first + h];
  }
  const auto* p = reinterpret_cast<const Value*>(t.panel) + k * kPanelRows + 8 * first;
  const float* x = t.x.x + (t.i + m) * t.x.x_stride;
  for (; k < end; ++k, p += kPanelRows) {
    __m256 a[M];
    for (int i = 0; i < M; ++i) a[i] = _mm256_set1_ps(x[i * t.x.x_stride + k]);
    for (int h = 0; h < kPart; ++h) {
      const __m256 v = widen(p + 8 * h);
      for (int i = 0; i < M; ++i) sum[h][i] = _mm256_fmadd_ps(v, a[i], sum[h][i]);
    }
  }
  for (int h = 0; h < kPart; ++h) {
    for (int i = 0; i < M; ++i) total[m + i][first + h] = sum[h][i];
  }
}

template <class Value>
struct Float {
  // Three tokens fill 12 accumulators with 32 rows, one fills 8 with 64.
  static void run(const Tile& t) {
    Floats total[kTokens];
    for (int m = 0; m < t.tokens; ++m) clear(total[m]);
    for (int64_t k = 0; k < t.w.cols; k += kRun) {
      int m = 0;
      for (; m + 3 <= t.tokens; m += 3) {
        add_float<Value, 4, 3>(t, 0, m, k, total);
        add_float<Value, 4, 3>(t, 4, m, k, total);
      }
      for (; m < t.tokens; ++m) add_float<Value, 8, 1>(t, 0, m, k, total);
    }
    store_all(t, total);
  }
};

template <class Kernel>
void matmul(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y, int64_t ldy) {
  for_each_tile<Kernel>(w, x, first, last, y, ldy);
}

}  // namespace

Matmul* const kMatmul[kPanelKinds] = {matmul<Float<float>>,
                                      matmul<Float<F16>>,
                                      matmul<Float<BF16>>,
                                      nullptr,
                                      matmul<I2>,
                                      matmul<I2Blocks>,
                                      matmul<Q4>,
                                      nullptr,
                                      matmul<Int8>,
                                      nullptr,
                                      nullptr,
                                      matmul<Q4K>,
                                      nullptr,
                                      nullptr};

}  // namespace nearfar::avx2
