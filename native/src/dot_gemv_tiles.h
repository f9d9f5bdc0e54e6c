// What the x86 kernels share, dot_gemv_zmm.h and dot_gemv_ymm.h: the rows of a call, tiles of
// them, and taking codes out of planes.  Included once by each, after it has defined in an
// anonymous namespace
//
//   Vector, kParts          a vector of codes, and how many of them are a step: 4 or 8
//   load(p), store(p, v)
//   shift_down<kBits>(v)    every byte by a constant, up where it is negative; bits of the
//                           neighbours come along and are masked off afterwards
//   masked<kMask>(v)
//   with_top<kMask>(v, t)   v | (t & mask)
#include "check.h"
#include "dot_gemv.h"

namespace nearfar {
namespace {

constexpr int64_t kStep = 256;  // bytes of 4 k x 64 rows
constexpr int64_t kPart = kStep / kParts;
constexpr int64_t kChunk = 128;  // rows of x that share an unpacked stretch

// One panel and the rows [i, i + m) of x, at most kChunk.
struct CallBase {
  const Panels& w;
  const Rows& x;
  const uint8_t* panel;
  int64_t n;  // first row of w
  int64_t i, m;
  float* y;
  int64_t ldy;

  const int8_t* q(int64_t token) const { return x.q + (i + token) * x.q_stride; }
  const int32_t* sums(int64_t token) const { return x.sums + (i + token) * x.n_sums; }
  const float* scales(int64_t token) const { return x.scales + (i + token) * x.n_scales; }
};

// Calls Kernel::run for each panel and each kChunk rows of x.
template <class Kernel>
void matmul(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y, int64_t ldy) {
  NF_DCHECK(w.cols == x.cols);
  for (int64_t p = first; p < last; ++p) {
    const uint8_t* panel = w.data + p * w.panel_bytes;
    for (int64_t i = 0; i < x.m; i += kChunk) {
      const int64_t m = x.m - i < kChunk ? x.m - i : kChunk;
      Kernel::run({{w, x, panel, p * kPanelRows, i, m, y, ldy}});
    }
  }
}

// Calls f.operator()<M>(first token) for tiles of at most kTokens, shared out evenly: 7 are 4 + 3.
template <int M, class F>
inline void call_tile(int64_t tokens, int64_t first, const F& f) {
  if (tokens == M) return f.template operator()<M>(first);
  if constexpr (M > 1) call_tile<M - 1>(tokens, first, f);
}
template <int kTokens, class F>
inline void for_each_tile(int64_t m, const F& f) {
  const int64_t n = (m + kTokens - 1) / kTokens;
  for (int64_t t = 0; t < n; ++t) call_tile<kTokens>((t + 1) * m / n - t * m / n, t * m / n, f);
}

// Calls use.operator()<index>(code) for the 4 k of each index: a vector of codes, one a byte.
template <int kLow, int kHigh, int kUnit, int kIndex = 0, class Use>
inline void for_each_code(const Vector* low, const Vector* high, const Use& use) {
  if constexpr (kIndex < kUnit / 4) {
    constexpr int kPerLow = 8 / kLow;
    Vector code = shift_down<kIndex % kPerLow * kLow>(low[kIndex / kPerLow]);
    if constexpr (kLow < 8) code = masked<(1 << kLow) - 1>(code);
    if constexpr (kHigh > 0) {
      constexpr int kPerHigh = 8 / kHigh;
      const Vector top = shift_down<kIndex % kPerHigh * kHigh - kLow>(high[kIndex / kPerHigh]);
      code = with_top<((1 << kHigh) - 1) << kLow>(code, top);
    }
    use.template operator()<kIndex>(code);
    for_each_code<kLow, kHigh, kUnit, kIndex + 1>(low, high, use);
  }
}

// The same for one part of a unit whose planes begin at p.
template <int kLow, int kHigh, int kUnit, class Use>
inline void for_each_code(const uint8_t* p, int part, const Use& use) {
  constexpr int kLowSteps = kUnit * kLow / 32, kHighSteps = kUnit * kHigh / 32;
  Vector low[kLowSteps], high[kHighSteps + 1];
  for (int s = 0; s < kLowSteps; ++s) low[s] = load(p + s * kStep + kPart * part);
  for (int s = 0; s < kHighSteps; ++s) high[s] = load(p + (kLowSteps + s) * kStep + kPart * part);
  for_each_code<kLow, kHigh, kUnit>(low, high, use);
}

// A unit as one code a byte, [k / 4][kParts][kPart].
template <int kLow, int kHigh, int kUnit>
inline void unpack_unit(const uint8_t* p, uint8_t* codes) {
  for (int part = 0; part < kParts; ++part) {
    for_each_code<kLow, kHigh, kUnit>(p, part, [&]<int kIndex>(Vector code) {
      store(codes + kIndex * kStep + kPart * part, code);
    });
  }
}

// Sum of q over group g of a kind, of the sums from the group's block on.
template <Form kForm>
inline int32_t group_sum(const int32_t* sums, int64_t g) {
  if constexpr (kForm.scheme == Scheme::kGroup || kForm.group == 16) return sums[g];
  return sums[2 * g] + sums[2 * g + 1];
}

// Values of the 16-bit float kinds; widen() of each file makes them f32.
struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

}  // namespace
}  // namespace nearfar
