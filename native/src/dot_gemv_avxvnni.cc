// AVX-VNNI kernels (+ AVX2, FMA, F16C): Alder Lake and later, Zen 5; CPUs without AVX-512 among
// them.
//
// VPDPBUSD multiplies 4 unsigned codes with 4 signed activations and adds all to the i32 lane of
// their row, without saturation: one instruction for the three of AVX2, and codes of 8 bits are as
// good as any.
#include <immintrin.h>

#include "dot_gemv.h"

#define NF_LEVEL avxvnni

namespace nearfar {
namespace {

template <int kMax>
struct Dot {
  static constexpr int kRun = 1 << 16;  // i32 sums: see dot_gemv_ymm.h
  static constexpr bool kFlip = false;
  static constexpr int kTokens = 6;
  // Two a clock, five clocks of latency: 10 accumulators would do, 8 to 12 fit.
  static constexpr int halves(int m) { return m <= 3 ? 4 : 2; }

  // In place: left to itself GCC 12 copies accumulators and spills them. Without {vex} assemblers
  // take the AVX-512 encoding.
  static void add(__m256i& sum, __m256i code, __m256i a) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(code), "x"(a));
  }
  static __m256i whole(__m256i sum) { return sum; }
};

}  // namespace
}  // namespace nearfar

#include "dot_gemv_ymm.h"
