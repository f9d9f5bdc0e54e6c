// The body of dot_gemv_{avx2,avxvnni}.cc: included once by each, after it has defined NF_LEVEL, its
// namespace, and in an anonymous namespace Dot<kMax>, products of unsigned codes of at most kMax
// with activations, |q| <= 127:
//
//   add(sum, code, a)   sum += code . a, for 8 rows x 4 k; `sum` is the level's own
//   whole(sum)          its i32 lanes, a row each
//   kRun                how many products a sum that began as zero takes
//   kFlip               the sums are of code - 128
//   kTokens, halves(M)  the tiles that fit the 16 registers: rows of x, and halves beside M of them
//
// A ymm is half a block of a panel: 8 rows x 4 k. One row of x takes codes from registers, a unit
// of a panel at a time: decoding is memory's speed. More rows unpack 256 k of a panel to one code a
// byte, in L1, and run tiles of rows of x over it: unpacking is paid once per 128 rows.
//
// Largest sums in i32 (2.1e9): of kW8 255 * 127 a k, K <= 65,536: 2.1e9 less 2.5e7; else of kRow 3
// * 127 a k, and pack() refuses K > 2^18: 1.0e8; of a group of 32 at most 32 * 255 * 127 = 1.1e6,
// and as much again for its offset.
#include <immintrin.h>

#include "dot_gemv.h"

namespace nearfar {
namespace {

constexpr int kHalves = 8, kParts = kHalves;  // halves of blocks, of 8 rows, in a panel
constexpr int64_t kStretch = 256;             // k: 16 KiB unpacked

using Vector = __m256i;
inline __m256i load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, __m256i v) { _mm256_store_si256(static_cast<__m256i*>(p), v); }
inline __m256i zero() { return _mm256_setzero_si256(); }

inline __m256i broadcast4(const int8_t* q) {
  int32_t v;
  __builtin_memcpy(&v, q, 4);
  return _mm256_set1_epi32(v);
}

inline __m256 load_f16(const uint8_t* p) {
  return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256i load_u8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline __m256i load_i8(const uint8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

// `n_bytes` on their way from memory: into L2 first, then, when they have come near, into L1. Past
// the last panel that fetches nothing of use and faults nowhere.
template <int n_bytes>
inline void stream(const uint8_t* p, int64_t ahead) {
#pragma GCC unroll 32
  for (int i = 0; i < n_bytes; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(p + ahead + i), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(p + ahead / 4 + i), _MM_HINT_T0);
  }
}

template <int kBits>
inline __m256i shift_down(__m256i v) {
  if constexpr (kBits > 0) return _mm256_srli_epi16(v, kBits);
  if constexpr (kBits < 0) return _mm256_slli_epi16(v, -kBits);
  return v;
}
template <int kMask>
inline __m256i masked(__m256i v) {
  return _mm256_and_si256(v, _mm256_set1_epi8(static_cast<char>(kMask)));
}

template <int kMask>
inline __m256i with_top(__m256i v, __m256i top) {
  return _mm256_or_si256(v, masked<kMask>(top));
}

}  // namespace
}  // namespace nearfar

#include "dot_gemv_tiles.h"

namespace nearfar {
namespace {

struct Call : CallBase {
  // y = v * w.scale for the rows of half h that exist
  void store(int64_t token, int h, __m256 v) const {
    const int64_t rows = w.rows - n - 8 * h;
    if (rows <= 0) return;
    float* out = y + (i + token) * ldy + n + 8 * h;
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

// ---- tiles ----

// How many of n products, a power of two, one sum takes.
template <int kMax>
constexpr int run_of(int n) {
  while (n > Dot<kMax>::kRun) n /= 2;
  return n;
}

// sum[h][m] = codes . q[m] over kSteps of 4 k, of the H halves from `codes` on
template <int kMax, int kSteps, int H, int M>
inline void dot(const uint8_t* codes, const int8_t* q, int64_t q_stride, __m256i (&sum)[H][M]) {
  constexpr int kRun = run_of<kMax>(kSteps);
#pragma GCC unroll 1
  for (int s = 0; s < kSteps; s += kRun) {
    __m256i part[H][M];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) part[h][m] = zero();
    }
#pragma GCC unroll 1
    for (int r = 0; r < kRun; ++r, codes += kStep, q += 4) {
      __m256i code[H];
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) code[h] = load(codes + 32 * h);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const __m256i a = broadcast4(q + m * q_stride);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) Dot<kMax>::add(part[h][m], code[h], a);
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const __m256i whole = Dot<kMax>::whole(part[h][m]);
        sum[h][m] = s == 0 ? whole : _mm256_add_epi32(sum[h][m], whole);
      }
    }
  }
}

// The same as a function of its own, where GCC would keep what lies around it in registers and
// spill the sums.
template <int kMax, int kSteps, int H, int M>
__attribute__((noinline)) void dot_alone(const uint8_t* codes, const int8_t* q, int64_t q_stride,
                                         __m256i (&sum)[H][M]) {
  dot<kMax, kSteps, H, M>(codes, q, q_stride, sum);
}

// ---- 2-bit ternary: i32 sums of 256 k, as they are or scaled ----

constexpr int kTernary = 3;                               // largest code
constexpr int64_t kTernaryBytes = kStretch / 16 * kStep;  // of 256 k

// sums[64] of one row of x over 256 k. Fields 0 and 2, 1 and 3 of a byte share a mask, the second
// of each after one shift; those of 1 and 3 collect 4 times their sum, and shifting that back is
// exact.  9 operations (13 with VPMADDUBSW) per 128 weights.
inline void dot_ternary(const uint8_t* codes, const int8_t* q, int64_t ahead, int32_t* sums) {
  constexpr int kTogether = 4, kSteps = 16;
  using Low = Dot<kTernary>;
  using High = Dot<4 * kTernary>;
  static_assert(Low::kRun >= 2 * kSteps);
  constexpr int kRun = run_of<4 * kTernary>(2 * kSteps) / 2;
  for (int h = 0; h < kHalves; h += kTogether) {
    __m256i low[kTogether], high[kTogether], high_whole[kTogether];
    for (int i = 0; i < kTogether; ++i) low[i] = high[i] = high_whole[i] = zero();
    const uint8_t* p = codes + 32 * h;
    const int8_t* x = q;
    for (int s = 0; s < kSteps; s += kRun) {
#pragma GCC unroll 1
      for (int r = 0; r < kRun; ++r, p += kStep, x += 16) {
        stream<32 * kTogether>(p, ahead);
        const __m256i a0 = broadcast4(x), a1 = broadcast4(x + 4);
        const __m256i a2 = broadcast4(x + 8), a3 = broadcast4(x + 12);
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) {
          const __m256i v = load(p + 32 * i), z = shift_down<4>(v);
          Low::add(low[i], masked<3>(v), a0);
          High::add(high[i], masked<12>(v), a1);
          Low::add(low[i], masked<3>(z), a2);
          High::add(high[i], masked<12>(z), a3);
        }
      }
      for (int i = 0; i < kTogether; ++i) {
        high_whole[i] = _mm256_add_epi32(high_whole[i], High::whole(high[i]));
        high[i] = zero();
      }
    }
    for (int i = 0; i < kTogether; ++i) {
      store(sums + 8 * (h + i),
            _mm256_add_epi32(Low::whole(low[i]), _mm256_srai_epi32(high_whole[i], 2)));
    }
  }
}

// Calls use(token, h, sum) with sum q * (code - 1) over 256 k, the j-th of a panel, in any order.
template <class Use>
inline void for_each_ternary_sum(const Call& c, const uint8_t* p, int64_t j, const Use& use) {
  const auto less_offset = [&](int64_t token, __m256i sum) {
    return _mm256_sub_epi32(sum, _mm256_set1_epi32(c.sums(token)[j]));
  };
  if (c.m == 1) {
    alignas(32) int32_t sums[kPanelRows];
    dot_ternary(p, c.q(0) + j * kStretch, c.w.ahead, sums);
    for (int h = 0; h < kHalves; ++h) use(0, h, less_offset(0, load(sums + 8 * h)));
    return;
  }
  alignas(64) uint8_t codes[kStretch * kPanelRows];
  for (int u = 0; u < 16; ++u) unpack_unit<2, 0, 16>(p + u * kStep, codes + u * 4 * kStep);
  for_each_tile<Dot<kTernary>::kTokens>(c.m, [&]<int M>(int64_t first) {
    constexpr int H = Dot<kTernary>::halves(M);
    for (int h = 0; h < kHalves; h += H) {
      __m256i sum[H][M];
      dot_alone<kTernary, kStretch / 4, H, M>(codes + 32 * h, c.q(first) + j * kStretch,
                                              c.x.q_stride, sum);
      for (int i = 0; i < H; ++i) {
        for (int m = 0; m < M; ++m) use(first + m, h + i, less_offset(first + m, sum[i][m]));
      }
    }
  });
}

struct I2 {
  static void run(const Call& c) {
    alignas(32) int32_t totals[kChunk * kPanelRows];
    __builtin_memset(totals, 0, c.m * kPanelRows * sizeof(int32_t));
    for (int64_t j = 0; j < c.w.cols / kStretch; ++j) {
      for_each_ternary_sum(c, c.panel + j * kTernaryBytes, j,
                           [&](int64_t token, int h, __m256i sum) {
                             int32_t* total = totals + token * kPanelRows + 8 * h;
                             store(total, _mm256_add_epi32(load(total), sum));
                           });
    }
    for (int64_t token = 0; token < c.m; ++token) {
      const __m256 s_x = _mm256_set1_ps(c.scales(token)[0]);
      for (int h = 0; h < kHalves; ++h) {
        const __m256 scale = _mm256_mul_ps(_mm256_load_ps(c.w.row_scales + c.n + 8 * h), s_x);
        const __m256i total = load(totals + token * kPanelRows + 8 * h);
        c.store(token, h, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(total)));
      }
    }
  }
};

// Bytes with one scale a row: nothing to unpack.  The panel is filled up to a multiple of 64 k with
// weights of zero that meet activations of zero.
struct W8 {
  static constexpr int kMax = 255, kRun = 64;  // largest code; k of a tile
  static constexpr int kOffset = Dot<kMax>::kFlip ? 0 : 128;

  static void run(const Call& c) {
    alignas(32) int32_t totals[kChunk * kPanelRows];
    __builtin_memset(totals, 0, c.m * kPanelRows * sizeof(int32_t));
    const uint8_t* p = c.panel;
    for (int64_t k = 0; k * kPanelRows < c.w.panel_bytes; k += kRun, p += kRun * kPanelRows) {
      if (c.m == 1) stream<kRun * kPanelRows / 2>(p, c.w.ahead);
      if (c.m == 1) stream<kRun * kPanelRows / 2>(p + kRun * kPanelRows / 2, c.w.ahead);
      for_each_tile<Dot<kMax>::kTokens>(c.m, [&]<int M>(int64_t first) {
        constexpr int H = Dot<kMax>::halves(M);
        for (int h = 0; h < kHalves; h += H) {
          __m256i sum[H][M];
          dot_alone<kMax, kRun / 4, H, M>(p + 32 * h, c.q(first) + k, c.x.q_stride, sum);
          for (int i = 0; i < H; ++i) {
            for (int m = 0; m < M; ++m) {
              int32_t* total = totals + (first + m) * kPanelRows + 8 * (h + i);
              store(total, _mm256_add_epi32(load(total), sum[i][m]));
            }
          }
        }
      });
    }
    for (int64_t token = 0; token < c.m; ++token) {
      int32_t sum_q = 0;
      for (int64_t j = 0; j < c.x.n_sums; ++j) sum_q += c.sums(token)[j];
      const __m256i offset = _mm256_set1_epi32(kOffset * sum_q);
      const __m256 s_x = _mm256_set1_ps(c.scales(token)[0]);
      for (int h = 0; h < kHalves; ++h) {
        const __m256 scale = _mm256_mul_ps(_mm256_load_ps(c.w.row_scales + c.n + 8 * h), s_x);
        const __m256i total = _mm256_sub_epi32(load(totals + token * kPanelRows + 8 * h), offset);
        c.store(token, h, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(total)));
      }
    }
  }
};

// The totals of the schemes that add floats, [kChunk][64], from zero.
struct Totals {
  alignas(32) float total[kChunk * kPanelRows];

  explicit Totals(int64_t m) { __builtin_memset(total, 0, m * kPanelRows * sizeof(float)); }
  float* of(int64_t token, int h) { return total + token * kPanelRows + 8 * h; }
  void store(const Call& c) {
    for (int64_t token = 0; token < c.m; ++token) {
      for (int h = 0; h < kHalves; ++h) c.store(token, h, _mm256_load_ps(of(token, h)));
    }
  }
};

struct I2Blocks {
  static void run(const Call& c) {
    Totals totals(c.m);
    const uint8_t* p = c.panel;
    for (int64_t j = 0; j < c.w.cols / kStretch; ++j, p += 256 + kTernaryBytes) {
      for_each_ternary_sum(c, p + 256, j, [&](int64_t token, int h, __m256i sum) {
        float* total = totals.of(token, h);
        const __m256 scale = _mm256_load_ps(reinterpret_cast<const float*>(p) + 8 * h);
        _mm256_store_ps(total,
                        _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(sum), _mm256_load_ps(total)));
      });
    }
    for (int64_t token = 0; token < c.m; ++token) {
      const __m256 s_x = _mm256_set1_ps(c.scales(token)[0]);
      for (int h = 0; h < kHalves; ++h) {
        c.store(token, h, _mm256_mul_ps(_mm256_load_ps(totals.of(token, h)), s_x));
      }
    }
  }
};

// ---- groups with scales of their own ----

template <PanelKind kKind>
struct Shape {
  static constexpr Form kForm = kForms[static_cast<int>(kKind)];
  static constexpr int kMax = (1 << (kForm.low + kForm.high)) - 1;  // largest code
  static constexpr int kOffset = Dot<kMax>::kFlip ? 0 : kForm.offset;
  static constexpr int kUnitBytes = kForm.side + kForm.unit * 8 * (kForm.low + kForm.high);
  static constexpr int kBlockBytes = kForm.head + kForm.block / kForm.unit * kUnitBytes;
  static constexpr int kGroups = kForm.unit / kForm.group;  // of a unit
  static constexpr int kSteps = kForm.group / 4;            // of a group
};

// sum q * (code - offset) as floats, of a group whose q add up to sum_q
template <PanelKind kKind>
inline __m256 group_product(__m256i sum, int32_t sum_q) {
  constexpr int kOffset = Shape<kKind>::kOffset;
  if constexpr (kOffset != 0) sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(kOffset * sum_q));
  return _mm256_cvtepi32_ps(sum);
}

// Scheme::kGroup: F after one more group.
template <PanelKind kKind>
inline __m256 add_group(__m256 total, __m256 s_w, __m256 min_w, float s_x, __m256i sum,
                        int32_t sum_q) {
  const __m256 scale_x = _mm256_set1_ps(s_x);
  total = _mm256_fmadd_ps(_mm256_mul_ps(s_w, scale_x), group_product<kKind>(sum, sum_q), total);
  if constexpr (!Shape<kKind>::kForm.has_min) return total;
  return _mm256_fmadd_ps(_mm256_mul_ps(min_w, scale_x), _mm256_set1_ps(static_cast<float>(sum_q)),
                         total);
}

// Scheme::kSuper: F after one more block, whose head is `head`.
template <PanelKind kKind>
inline __m256 add_super(__m256 total, const uint8_t* head, int h, float s_x, __m256 scaled,
                        __m256 mins) {
  const __m256 scale_x = _mm256_set1_ps(s_x);
  total = _mm256_fmadd_ps(_mm256_mul_ps(load_f16(head + 16 * h), scale_x), scaled, total);
  if constexpr (!Shape<kKind>::kForm.has_min) return total;
  return _mm256_fnmadd_ps(_mm256_mul_ps(load_f16(head + 128 + 16 * h), scale_x), mins, total);
}

// Scheme::kSuper: the integer scale and min of group g of a unit that begins at p, as floats.
template <PanelKind kKind>
struct Side {
  __m256 scale, min = _mm256_setzero_ps();

  Side(const uint8_t* p, int h, int g) {
    constexpr Form kForm = Shape<kKind>::kForm;
    if constexpr (kForm.side == 64) {
      const __m256i both = load_u8(p + 8 * h);
      scale = _mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15)));
      min = _mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4));
    } else if constexpr (kForm.has_min) {
      scale = _mm256_cvtepi32_ps(load_u8(p + 8 * h));
      min = _mm256_cvtepi32_ps(load_u8(p + 64 + 8 * h));
    } else {
      scale = _mm256_cvtepi32_ps(load_i8(p + 64 * g + 8 * h));
    }
  }
};

// sums[g] = codes . q of the groups of half h of a unit, whose broadcast q are `a`
template <PanelKind kKind>
inline void dot_unit(const uint8_t* planes, int h, const __m256i* a,
                     __m256i (&sums)[Shape<kKind>::kGroups]) {
  using S = Shape<kKind>;
  constexpr int kRun = run_of<S::kMax>(S::kSteps);
  __m256i part;
  for_each_code<S::kForm.low, S::kForm.high, S::kForm.unit>(
      planes, h, [&]<int kIndex>(__m256i code) {
        if constexpr (kIndex % kRun == 0) part = zero();
        Dot<S::kMax>::add(part, code, a[kIndex]);
        if constexpr (kIndex % kRun == kRun - 1) {
          __m256i& sum = sums[kIndex / S::kSteps];
          const __m256i whole = Dot<S::kMax>::whole(part);
          sum = kIndex % S::kSteps < kRun ? whole : _mm256_add_epi32(sum, whole);
        }
      });
}

// 256 k of a panel (or what is left of K): codes, and the scales of its groups as floats.
template <PanelKind kKind>
struct Stretch {
  using S = Shape<kKind>;
  static constexpr Form kForm = S::kForm;
  static constexpr bool kInPlace = kForm.low == 8;  // the codes are bytes already
  static constexpr int64_t kGroupStride = kInPlace ? S::kBlockBytes : kForm.group * kPanelRows;

  alignas(64) float scale[kStretch / 16][kPanelRows], min[kStretch / 16][kPanelRows];
  alignas(64) uint8_t unpacked[kInPlace ? 64 : kStretch * kPanelRows];
  const uint8_t* codes;
  const uint8_t* head;

  void unpack(const uint8_t* p, int64_t k) {
    head = p;
    codes = kInPlace ? p + kForm.head : unpacked;
    for (int64_t first = 0; first < k; first += kForm.block) {
      if constexpr (kForm.scheme == Scheme::kGroup) {
        for (int h = 0; h < kHalves; ++h) {
          put(first / 32, h, load_f16(p + 16 * h),
              load_f16(p + (kForm.has_min ? 128 : 0) + 16 * h));
        }
      }
      p += kForm.head;
      for (int j = 0; j < kForm.block; j += kForm.unit, p += S::kUnitBytes) {
        if constexpr (kForm.scheme == Scheme::kSuper) {
          for (int g = 0; g < S::kGroups; ++g) {
            for (int h = 0; h < kHalves; ++h) {
              const Side<kKind> side(p, h, g);
              put(j / kForm.group + g, h, side.scale, side.min);
            }
          }
        }
        if constexpr (!kInPlace) {
          unpack_unit<kForm.low, kForm.high, kForm.unit>(p + kForm.side,
                                                         unpacked + (first + j) * kPanelRows);
        }
      }
    }
  }

  void put(int64_t group, int h, __m256 s, __m256 m) {
    _mm256_store_ps(&scale[group][8 * h], s);
    if constexpr (kForm.has_min) _mm256_store_ps(&min[group][8 * h], m);
  }
  __m256 scale_of(int64_t group, int h) const { return _mm256_load_ps(&scale[group][8 * h]); }
  __m256 min_of(int64_t group, int h) const {
    return kForm.has_min ? _mm256_load_ps(&min[group][8 * h]) : _mm256_setzero_ps();
  }
};

template <PanelKind kKind>
struct Grouped {
  using S = Shape<kKind>;
  static constexpr Form kForm = S::kForm;
  static constexpr int kScaleK = kForm.block;  // k of x that share a scale, and a sum
  static constexpr int kSumK = kForm.scheme == Scheme::kGroup ? 32 : 16;

  // ---- one row of x: codes stay in registers ----

  static void one(const Call& c, Totals& totals) {
    const uint8_t* p = c.panel;
    const int8_t* q = c.q(0);
    for (int64_t j = 0; j < c.w.cols / kForm.block; ++j) {
      const uint8_t* head = p;
      const float s_x = c.scales(0)[j];
      __m256 scaled[kHalves], mins[kHalves];
      for (int h = 0; h < kHalves; ++h) scaled[h] = mins[h] = _mm256_setzero_ps();
      stream<kForm.head>(p, c.w.ahead);
      p += kForm.head;
      for (int k = 0; k < kForm.block; k += kForm.unit, p += S::kUnitBytes, q += kForm.unit) {
        stream<S::kUnitBytes>(p, c.w.ahead);
        __m256i a[kForm.unit / 4];
        for (int i = 0; i < kForm.unit / 4; ++i) a[i] = broadcast4(q + 4 * i);
        for (int h = 0; h < kHalves; ++h) {
          __m256i sums[S::kGroups];
          dot_unit<kKind>(p + kForm.side, h, a, sums);
          if constexpr (kForm.scheme == Scheme::kGroup) {
            float* total = totals.of(0, h);
            const __m256 min_w =
                kForm.has_min ? load_f16(head + 128 + 16 * h) : _mm256_setzero_ps();
            _mm256_store_ps(total, add_group<kKind>(_mm256_load_ps(total), load_f16(head + 16 * h),
                                                    min_w, s_x, sums[0], c.sums(0)[j]));
          } else {
            for (int g = 0; g < S::kGroups; ++g) {
              const Side<kKind> side(p, h, g);
              const int32_t sum_q = group_sum<kForm>(c.sums(0) + j * 16, k / kForm.group + g);
              scaled[h] =
                  _mm256_fmadd_ps(side.scale, group_product<kKind>(sums[g], sum_q), scaled[h]);
              if constexpr (kForm.has_min) {
                mins[h] =
                    _mm256_fmadd_ps(side.min, _mm256_set1_ps(static_cast<float>(sum_q)), mins[h]);
              }
            }
          }
        }
      }
      if constexpr (kForm.scheme == Scheme::kSuper) {
        for (int h = 0; h < kHalves; ++h) {
          float* total = totals.of(0, h);
          _mm256_store_ps(
              total, add_super<kKind>(_mm256_load_ps(total), head, h, s_x, scaled[h], mins[h]));
        }
      }
    }
  }

  // ---- M rows of x: tiles over unpacked codes ----

  // Adds the groups of a stretch, of n k from k on, to the totals of H halves and M tokens. A
  // function of its own, and everything it reads in variables of its own: stores may not change
  // them.
  template <int H, int M>
  __attribute__((noinline)) static void add_tile(const Call& c, const Stretch<kKind>& w,
                                                 int64_t first, int h0, int64_t k, int64_t n,
                                                 Totals& totals) {
    const int8_t* q = c.q(first) + k;
    const float* scales = c.scales(first) + k / kScaleK;
    const int32_t* sums = c.sums(first) + k / kSumK;
    const int64_t q_stride = c.x.q_stride, n_scales = c.x.n_scales, n_sums = c.x.n_sums;
    const uint8_t* codes = w.codes + 32 * h0;
    const uint8_t* head = w.head;
    float* total = totals.of(first, h0);
    __m256 scaled[H][M], mins[H][M];
    for (int h = 0; h < H; ++h) {
      for (int m = 0; m < M; ++m) scaled[h][m] = mins[h][m] = _mm256_setzero_ps();
    }
    for (int64_t g = 0; g < n / kForm.group; ++g) {
      __m256i sum[H][M];
      dot<S::kMax, S::kSteps, H, M>(codes, q, q_stride, sum);
      codes += Stretch<kKind>::kGroupStride;
      q += kForm.group;
#pragma GCC unroll 4
      for (int h = 0; h < H; ++h) {
        const __m256 scale = w.scale_of(g, h0 + h), min = w.min_of(g, h0 + h);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
          const int32_t sum_q = group_sum<kForm>(sums + m * n_sums, g);
          if constexpr (kForm.scheme == Scheme::kGroup) {
            float* out = total + m * kPanelRows + 8 * h;
            _mm256_store_ps(out, add_group<kKind>(_mm256_load_ps(out), scale, min,
                                                  scales[m * n_scales + g], sum[h][m], sum_q));
          } else {
            scaled[h][m] =
                _mm256_fmadd_ps(scale, group_product<kKind>(sum[h][m], sum_q), scaled[h][m]);
            if constexpr (kForm.has_min) {
              mins[h][m] =
                  _mm256_fmadd_ps(min, _mm256_set1_ps(static_cast<float>(sum_q)), mins[h][m]);
            }
          }
        }
      }
    }
    if constexpr (kForm.scheme == Scheme::kSuper) {
      for (int h = 0; h < H; ++h) {
        for (int m = 0; m < M; ++m) {
          float* out = total + m * kPanelRows + 8 * h;
          _mm256_store_ps(out, add_super<kKind>(_mm256_load_ps(out), head, h0 + h,
                                                scales[m * n_scales], scaled[h][m], mins[h][m]));
        }
      }
    }
  }

  static void many(const Call& c, Totals& totals) {
    Stretch<kKind> w;
    for (int64_t k = 0; k < c.w.cols; k += kStretch) {
      const int64_t n = c.w.cols - k < kStretch ? c.w.cols - k : kStretch;
      w.unpack(c.panel + k / kForm.block * S::kBlockBytes, n);
      for_each_tile<Dot<S::kMax>::kTokens>(c.m, [&]<int M>(int64_t first) {
        constexpr int H = Dot<S::kMax>::halves(M);
        for (int h = 0; h < kHalves; h += H) add_tile<H, M>(c, w, first, h, k, n, totals);
      });
    }
  }

  static void run(const Call& c) {
    Totals totals(c.m);
    if (c.m == 1) {
      one(c, totals);
    } else {
      many(c, totals);
    }
    totals.store(c);
  }
};

// ---- floats: one chain of fma per row, in k order ----

inline __m256 widen(const float* p) { return _mm256_load_ps(p); }

inline __m256 widen(const F16* p) { return load_f16(reinterpret_cast<const uint8_t*>(p)); }

inline __m256 widen(const BF16* p) {
  const __m128i h = _mm_load_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

template <class Value>
struct Float {
  static constexpr int64_t kRun = 64;  // k of which 64 rows stay in L1 for all tokens

  // Three tokens fill 12 accumulators with 32 rows, one fills 8 with 64.
  template <int H, int M>
  static void add_tile(const Call& c, int64_t first, int h0, int64_t k, Totals& totals) {
    const int64_t end = k + kRun < c.w.cols ? k + kRun : c.w.cols;
    __m256 sum[H][M];
    for (int h = 0; h < H; ++h) {
      for (int m = 0; m < M; ++m) sum[h][m] = _mm256_load_ps(totals.of(first + m, h0 + h));
    }
    const auto* p = reinterpret_cast<const Value*>(c.panel) + k * kPanelRows + 8 * h0;
    const float* x = c.x.x + (c.i + first) * c.x.x_stride;
    for (; k < end; ++k, p += kPanelRows) {
      if constexpr (M == 1) {
        stream<H * 8 * sizeof(Value)>(reinterpret_cast<const uint8_t*>(p), c.w.ahead);
      }
      __m256 a[M];
      for (int m = 0; m < M; ++m) a[m] = _mm256_set1_ps(x[m * c.x.x_stride + k]);
      for (int h = 0; h < H; ++h) {
        const __m256 v = widen(p + 8 * h);
        for (int m = 0; m < M; ++m) sum[h][m] = _mm256_fmadd_ps(v, a[m], sum[h][m]);
      }
    }
    for (int h = 0; h < H; ++h) {
      for (int m = 0; m < M; ++m) _mm256_store_ps(totals.of(first + m, h0 + h), sum[h][m]);
    }
  }

  static void run(const Call& c) {
    Totals totals(c.m);
    for (int64_t k = 0; k < c.w.cols; k += kRun) {
      for_each_tile<3>(c.m, [&]<int M>(int64_t first) {
        constexpr int H = M == 1 ? 8 : 4;
        for (int h = 0; h < kHalves; h += H) add_tile<H, M>(c, first, h, k, totals);
      });
    }
    totals.store(c);
  }
};

// Pairs of k as the panel holds them; in k order, so the bits are those of `ref`.
struct BF16Dot {
  static constexpr int64_t kRun = 64;  // k of which 64 rows stay in L1 for all tokens

  static __m256 low(__m256i pair) { return _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)); }
  static __m256 high(__m256i pair) {
    return _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32(-65536)));
  }

  template <int H, int M>
  static void add_tile(const Call& c, int64_t first, int h0, int64_t k, Totals& totals) {
    const int64_t end = k + kRun < c.w.cols ? k + kRun : c.w.cols;
    __m256 sum[H][M];
    for (int h = 0; h < H; ++h) {
      for (int m = 0; m < M; ++m) sum[h][m] = _mm256_load_ps(totals.of(first + m, h0 + h));
    }
    const uint8_t* p = c.panel + k / 2 * kStep + 32 * h0;
    const uint16_t* x = c.x.bf16 + (c.i + first) * c.x.bf16_stride;
    for (; k < end; k += 2, p += kStep) {
      if constexpr (M == 1) stream<H * 32>(p, c.w.ahead);
      for (int h = 0; h < H; ++h) {
        const __m256i v = load(p + 32 * h);
        for (int m = 0; m < M; ++m) {
          int32_t pair;
          __builtin_memcpy(&pair, x + m * c.x.bf16_stride + k, 4);
          const __m256i a = _mm256_set1_epi32(pair);
          sum[h][m] = _mm256_fmadd_ps(low(v), low(a), sum[h][m]);
          sum[h][m] = _mm256_fmadd_ps(high(v), high(a), sum[h][m]);
        }
      }
    }
    for (int h = 0; h < H; ++h) {
      for (int m = 0; m < M; ++m) _mm256_store_ps(totals.of(first + m, h0 + h), sum[h][m]);
    }
  }

  static void run(const Call& c) {
    Totals totals(c.m);
    for (int64_t k = 0; k < c.w.cols; k += kRun) {
      for_each_tile<3>(c.m, [&]<int M>(int64_t first) {
        constexpr int H = M == 1 ? 8 : 4;
        for (int h = 0; h < kHalves; h += H) add_tile<H, M>(c, first, h, k, totals);
      });
    }
    totals.store(c);
  }
};

}  // namespace

// By PanelKind. Taking five trits apart costs more than the bytes save here: ternary weights are
// kI2.
Matmul* const NF_LEVEL::kMatmul[kPanelKinds] = {matmul<Float<float>>,
                                                matmul<Float<F16>>,
                                                matmul<Float<BF16>>,
                                                nullptr,
                                                matmul<I2>,
                                                matmul<I2Blocks>,
                                                matmul<Grouped<PanelKind::kQ4>>,
                                                matmul<Grouped<PanelKind::kQ4_1>>,
                                                matmul<Grouped<PanelKind::kInt8>>,
                                                matmul<Grouped<PanelKind::kQ2K>>,
                                                matmul<Grouped<PanelKind::kQ3K>>,
                                                matmul<Grouped<PanelKind::kQ4K>>,
                                                matmul<Grouped<PanelKind::kQ5K>>,
                                                matmul<Grouped<PanelKind::kQ6K>>,
                                                nullptr,
                                                matmul<W8>,
                                                matmul<BF16Dot>};

}  // namespace nearfar
