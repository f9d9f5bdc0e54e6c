// The body of dot_gemv_{neon,neon_dot,neon_i8mm}.cc: included once by each, after it has defined
// NF_LEVEL, its namespace, and in an anonymous namespace
//
//   kSignedCodes   the products take codes as i8: a byte w + 128 must lose its offset first
//   Sums<M>        i32 sums of 4 rows and M tokens:
//     clear()
//     add<kMaxCode>(code, q, stride)   sum[m] += sum over 16 k of code * q[m * stride + k]; code[i]
//                                      is 4 rows x 4 k, k = 4i..4i+3, each at most kMaxCode
//     of(m)                            the 4 rows of token m
//
// A q register is a quarter of a block: 4 rows x 4 k. 16 k are the unit of all levels, because one
// load of activations then serves 4 products by element, and no group of scales is shorter.
// What a kernel decodes, it uses for up to kTokens tokens.
//
// Largest sums, |q| <= 127, all in i32 (2.1e9): of kRow 3 * 127 a k, and pack() refuses K > 2^18:
// 1.0e8; of a group of 32 at most 32 * 255 * 127 = 1.1e6, and as much again for its offset.
#include <arm_neon.h>

#include "check.h"
#include "dot_gemv.h"

namespace nearfar {
namespace {

constexpr int kQuarters = 16;   // quarters of blocks, of 4 rows, in a panel
constexpr int64_t kStep = 256;  // bytes of 4 blocks
constexpr int kTokens = 4;      // rows of x that share a reading of a panel

// One panel and M tokens: rows n.. of w, rows i.. of x.
struct Tile {
  const Panels& w;
  const Rows& x;
  const uint8_t* panel;
  int64_t n, i;
  float* y;
  int64_t ldy;

  const int8_t* q(int64_t k) const { return x.q + i * x.q_stride + k; }  // token m: + m * q_stride
  int32_t sum(int m, int64_t j) const { return x.sums[(i + m) * x.n_sums + j]; }
  float scale(int m, int64_t j) const { return x.scales[(i + m) * x.n_scales + j]; }

  // y = v * w.scale for the rows of quarter h that exist
  void store(int m, int h, float32x4_t v) const {
    const int64_t rows = w.rows - n - 4 * h;
    if (rows <= 0) return;
    float* out = y + (i + m) * ldy + n + 4 * h;
    v = vmulq_n_f32(v, w.scale);
    if (rows >= 4) {
      vst1q_f32(out, v);
    } else {
      __builtin_memcpy(out, &v, rows * sizeof(float));
    }
  }
};

template <class Kernel, int M>
inline void run_tile(const Tile& t, int64_t tokens) {
  if (tokens == M) return Kernel::template run<M>(t);
  if constexpr (M > 1) run_tile<Kernel, M - 1>(t, tokens);
}

// Every panel is read once per kTokens rows of x, shared out evenly: 5 rows are 3 and 2.
template <class Kernel>
inline void for_each_tile(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                          int64_t ldy) {
  NF_DCHECK(w.cols == x.cols);
  const int64_t n_tiles = (x.m + kTokens - 1) / kTokens;
  for (int64_t p = first; p < last; ++p) {
    const uint8_t* panel = w.data + p * w.panel_bytes;
    for (int64_t tile = 0; tile < n_tiles; ++tile) {
      const int64_t i = tile * x.m / n_tiles, end = (tile + 1) * x.m / n_tiles;
      run_tile<Kernel, kTokens>({w, x, panel, p * kPanelRows, i, y, ldy}, end - i);
    }
  }
}

// 64 rows of M tokens. They stay in L1: 16 M registers would be too many, and a quarter comes back
// to its own only after 16 k or more.
template <int M>
using Totals = int32x4_t[kQuarters][M];
template <int M>
using Floats = float32x4_t[kQuarters][M];

inline float32x4_t load_f16(const uint8_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}
inline float32x4_t load_f32(const uint8_t* p) { return vreinterpretq_f32_u8(vld1q_u8(p)); }

// 4 bytes to the lanes of their rows
inline int32x4_t load_u8(const uint8_t* p) {
  uint32_t v;
  __builtin_memcpy(&v, p, 4);
  const uint16x8_t wide = vmovl_u8(vcreate_u8(v));
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)));
}
inline int32x4_t load_i8(const uint8_t* p) {
  uint32_t v;
  __builtin_memcpy(&v, p, 4);
  return vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(v))));
}

// ---- codes of one quarter, whose steps lie 256 bytes apart ----

// kBits bits from bit kFrom to bit kTo. A field that ends at bit 7 is alone after its shift to 0.
template <int kFrom, int kTo, int kBits>
inline uint8x16_t move(uint8x16_t v) {
  if constexpr (kFrom > kTo) v = vshrq_n_u8(v, kFrom - kTo);
  if constexpr (kFrom < kTo) v = vshlq_n_u8(v, kTo - kFrom);
  if constexpr (kTo > 0 || kFrom + kBits < 8)
    v = vandq_u8(v, vdupq_n_u8(((1 << kBits) - 1) << kTo));
  return v;
}

// From a plane of kBits bits: those of k..k+3, at bit kTo.
template <int kBits, int kTo, int k>
inline uint8x16_t field(const uint8_t* plane) {
  return move<k / 4 % (8 / kBits) * kBits, kTo, kBits>(vld1q_u8(plane + k * kBits / 32 * kStep));
}

// A unit of a kind: `side` bytes, the plane of the low bits, the plane of the high bits (mat.h).
template <PanelKind kKind>
struct Unit {
  static constexpr Form kForm = kForms[static_cast<int>(kKind)];
  static constexpr int kBits = kForm.low + kForm.high;
  static constexpr int kLowBytes = 8 * kForm.low * kForm.unit;
  static constexpr int kBytes = kForm.side + kLowBytes + 8 * kForm.high * kForm.unit;
  // Bytes w + 128 as i8 are w once their top bit is flipped.
  static constexpr bool kFlip = kBits == 8 && kSignedCodes;
  // A weight is the code, as the products see it, less this.
  static constexpr int kOffset = kFlip ? 0 : kForm.offset;

  // 4 rows x 4 k, k..k+3 of the unit
  template <int k>
  static uint8x16_t codes(const uint8_t* planes) {
    uint8x16_t code = field<kForm.low, 0, k>(planes);
    if constexpr (kForm.high > 0) {
      code = vorrq_u8(code, field<kForm.high, kForm.low, k>(planes + kLowBytes));
    }
    return kFlip ? veorq_u8(code, vdupq_n_u8(128)) : code;
  }

  // sum += code * q over [k, end) of the unit, multiples of 16
  template <int k, int end, int M>
  static void add(const uint8_t* planes, const int8_t* q, int64_t stride, Sums<M>& sum) {
    if constexpr (k < end) {
      const uint8x16_t code[4] = {codes<k>(planes), codes<k + 4>(planes), codes<k + 8>(planes),
                                  codes<k + 12>(planes)};
      sum.template add<(1 << kBits) - 1>(code, q + k, stride);
      add<k + 16, end, M>(planes, q, stride, sum);
    }
  }
};

// ---- kernels, one per Scheme; dot_gemv.h has the equations ----

template <int M>
inline void store_all(const Tile& t, const Floats<M>& total) {
  for (int h = 0; h < kQuarters; ++h) {
    for (int m = 0; m < M; ++m) t.store(m, h, total[h][m]);
  }
}

inline int32x4_t less(int32x4_t sum, int32_t offset) { return vsubq_s32(sum, vdupq_n_s32(offset)); }

// The sums of 256 k without scales of their own, less the offset of the codes: of quarter h, `p`
// its first unit.
template <PanelKind kKind, int M>
inline void dot_256(const Tile& t, const uint8_t* p, int h, int64_t k, int32x4_t (&sums)[M]) {
  using U = Unit<kKind>;
  Sums<M> sum;
  sum.clear();
  for (int64_t end = k + 256, i = k; i < end; i += U::kForm.unit, p += U::kBytes) {
    U::template add<0, U::kForm.unit, M>(p + 16 * h, t.q(i), t.x.q_stride, sum);
  }
  for (int m = 0; m < M; ++m) sums[m] = less(sum.of(m), U::kOffset * t.sum(m, k / 256));
}

template <PanelKind kKind>
struct RowKernel {
  template <int M>
  static void run(const Tile& t) {
    Totals<M> total = {};
    const uint8_t* p = t.panel;
    for (int64_t k = 0; k < t.w.cols; k += 256, p += 256 / Unit<kKind>::kForm.unit * kStep) {
      for (int h = 0; h < kQuarters; ++h) {
        int32x4_t sums[M];
        dot_256<kKind, M>(t, p, h, k, sums);
        for (int m = 0; m < M; ++m) total[h][m] = vaddq_s32(total[h][m], sums[m]);
      }
    }
    for (int h = 0; h < kQuarters; ++h) {
      const float32x4_t s_w = vld1q_f32(t.w.row_scales + t.n + 4 * h);
      for (int m = 0; m < M; ++m) {
        const float32x4_t scale = vmulq_n_f32(s_w, t.scale(m, 0));
        t.store(m, h, vmulq_f32(scale, vcvtq_f32_s32(total[h][m])));
      }
    }
  }
};

template <PanelKind kKind>
struct BlocksKernel {
  template <int M>
  static void run(const Tile& t) {
    using U = Unit<kKind>;
    Floats<M> total = {};
    const uint8_t* p = t.panel;
    for (int64_t k = 0; k < t.w.cols; k += 256, p += U::kForm.head + 256 / U::kForm.unit * kStep) {
      for (int h = 0; h < kQuarters; ++h) {
        int32x4_t sums[M];
        dot_256<kKind, M>(t, p + U::kForm.head, h, k, sums);
        const float32x4_t s_w = load_f32(p + 16 * h);
        for (int m = 0; m < M; ++m) {
          total[h][m] = vfmaq_f32(total[h][m], s_w, vcvtq_f32_s32(sums[m]));
        }
      }
    }
    for (int h = 0; h < kQuarters; ++h) {
      for (int m = 0; m < M; ++m) total[h][m] = vmulq_n_f32(total[h][m], t.scale(m, 0));
    }
    store_all<M>(t, total);
  }
};

template <PanelKind kKind>
struct GroupKernel {
  template <int M>
  static void run(const Tile& t) {
    using U = Unit<kKind>;
    Floats<M> total = {};
    const uint8_t* p = t.panel;
    for (int64_t j = 0; j < t.w.cols / 32; ++j, p += U::kForm.head + U::kBytes) {
      for (int h = 0; h < kQuarters; ++h) {
        Sums<M> sum;
        sum.clear();
        U::template add<0, 32, M>(p + U::kForm.head + 16 * h, t.q(j * 32), t.x.q_stride, sum);
        const float32x4_t s_w = load_f16(p + 8 * h);
        for (int m = 0; m < M; ++m) {
          const float s_x = t.scale(m, j);
          const int32x4_t whole = less(sum.of(m), U::kOffset * t.sum(m, j));
          total[h][m] = vfmaq_f32(total[h][m], vmulq_n_f32(s_w, s_x), vcvtq_f32_s32(whole));
          if constexpr (U::kForm.has_min) {
            const float32x4_t min = vmulq_n_f32(load_f16(p + 128 + 8 * h), s_x);
            total[h][m] = vfmaq_n_f32(total[h][m], min, static_cast<float>(t.sum(m, j)));
          }
        }
      }
    }
    store_all<M>(t, total);
  }
};

template <PanelKind kKind>
struct SuperKernel {
  using U = Unit<kKind>;
  static constexpr int kGroup = U::kForm.group;  // 16 or 32 k
  static constexpr bool kMin = U::kForm.has_min;

  template <int M>
  static void run(const Tile& t) {
    Floats<M> total = {};
    const uint8_t* p = t.panel;
    for (int64_t j = 0; j < t.w.cols / 256; ++j) {
      const uint8_t* d = p;
      Floats<M> scaled = {}, mins = {};
      p += U::kForm.head;
      for (int64_t k = j * 256; k < (j + 1) * 256; k += U::kForm.unit, p += U::kBytes) {
        for (int h = 0; h < kQuarters; ++h) add_groups<0, M>(t, p, h, k, scaled[h], mins[h]);
      }
      for (int h = 0; h < kQuarters; ++h) {
        const float32x4_t d_w = load_f16(d + 8 * h);
        for (int m = 0; m < M; ++m) {
          const float s_x = t.scale(m, j);
          total[h][m] = vfmaq_f32(total[h][m], vmulq_n_f32(d_w, s_x), scaled[h][m]);
          if constexpr (kMin) {
            const float32x4_t dmin = vmulq_n_f32(load_f16(d + 128 + 8 * h), s_x);
            total[h][m] = vfmsq_f32(total[h][m], dmin, mins[h][m]);
          }
        }
      }
    }
    store_all<M>(t, total);
  }

  // The groups of a unit from `first` on, of quarter h.
  template <int first, int M>
  static void add_groups(const Tile& t, const uint8_t* unit, int h, int64_t k,
                         float32x4_t (&scaled)[M], float32x4_t (&mins)[M]) {
    if constexpr (first < U::kForm.unit) {
      Sums<M> sum;
      sum.clear();
      U::template add<first, first + kGroup, M>(unit + U::kForm.side + 16 * h, t.q(k), t.x.q_stride,
                                                sum);
      int32x4_t scale, min = vdupq_n_s32(0);
      if constexpr (!kMin) {
        scale = load_i8(unit + first / kGroup * 64 + 4 * h);
      } else if constexpr (U::kForm.side == 64) {  // scale | min << 4
        const int32x4_t both = load_u8(unit + 4 * h);
        scale = vandq_s32(both, vdupq_n_s32(15));
        min = vshrq_n_s32(both, 4);
      } else {
        scale = load_u8(unit + 4 * h);
        min = load_u8(unit + 64 + 4 * h);
      }
      for (int m = 0; m < M; ++m) {
        int32_t sum_q = t.sum(m, (k + first) / 16);
        if constexpr (kGroup == 32) sum_q += t.sum(m, (k + first) / 16 + 1);
        const int32x4_t whole = less(sum.of(m), U::kOffset * sum_q);
        scaled[m] = vfmaq_f32(scaled[m], vcvtq_f32_s32(scale), vcvtq_f32_s32(whole));
        if constexpr (kMin) {
          mins[m] = vfmaq_n_f32(mins[m], vcvtq_f32_s32(min), static_cast<float>(sum_q));
        }
      }
      add_groups<first + kGroup, M>(t, unit, h, k, scaled, mins);
    }
  }
};

template <class Kernel>
void matmul(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y, int64_t ldy) {
  for_each_tile<Kernel>(w, x, first, last, y, ldy);
}

}  // namespace

// By PanelKind. Five trits a byte need a division or a table of 243 bytes, too much for 16 bytes at
// a time: ternary weights are kI2 here.
Matmul* const NF_LEVEL::kMatmul[kPanelKinds] = {neon::matmul_f32,
                                                neon::matmul_f16,
                                                neon::matmul_bf16,
                                                nullptr,
                                                matmul<RowKernel<PanelKind::kI2>>,
                                                matmul<BlocksKernel<PanelKind::kI2Blocks>>,
                                                matmul<GroupKernel<PanelKind::kQ4>>,
                                                matmul<GroupKernel<PanelKind::kQ4_1>>,
                                                matmul<GroupKernel<PanelKind::kInt8>>,
                                                matmul<SuperKernel<PanelKind::kQ2K>>,
                                                matmul<SuperKernel<PanelKind::kQ3K>>,
                                                matmul<SuperKernel<PanelKind::kQ4K>>,
                                                matmul<SuperKernel<PanelKind::kQ5K>>,
                                                matmul<SuperKernel<PanelKind::kQ6K>>,
                                                nullptr};

}  // namespace nearfar
