// AVX2 kernels (+ FMA, F16C): Haswell, Zen and later.
//
// VPMADDUBSW multiplies unsigned codes with signed activations and adds pairs to i16, VPMADDWD with
// ones adds those to i32. An i16 ends at 32,767, a pair is at most 2 * code * 127, so a sum takes
//
//   code           pair in i16   products   i16 sum at most
//   3   i2, q2_k           762   43         32 (128 k): 24,384
//   7   q3_k             1,778   18          4  (16 k):  7,112
//   12  i2 in place      3,048   10          8 (4 steps, 2 fields): 24,384
//   15  q4, q4_1, q4_k   3,810    8          8  (32 k): 30,480
//   31  q5_k             7,874    4          4  (16 k): 31,496
//   63  q6_k            16,002    2          2   (8 k): 32,004
//
// before VPMADDWD; kRun is the column of products. 255 would be 64,770: int8 codes become
// w = code - 128 and multiply as |w| with q * sign(w), 2 * 128 * 127 = 32,512. |w| = 0..128 fits an
// unsigned byte, and q, never -128, can be negated.
#include <immintrin.h>

#include "dot_gemv.h"

#define NF_LEVEL avx2

namespace nearfar {
namespace {

// Sums are added to in place: left to itself GCC 12 copies accumulators and spills them.
inline __m256i add_pairs(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

template <int kMax>
struct Dot {
  static constexpr int kRun = 32767 / (2 * kMax * 127);
  static constexpr bool kFlip = false;
  static constexpr int kTokens = 6;
  // An addition of i16 takes a clock: few accumulators suffice, the rest is for loads.
  static constexpr int halves(int m) { return m <= 2 ? 4 : 2; }

  static void add(__m256i& sum, __m256i code, __m256i a) {
    asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(_mm256_maddubs_epi16(code, a)));
  }
  static __m256i whole(__m256i sum) { return add_pairs(sum); }
};

template <>
struct Dot<255> {
  static constexpr int kRun = 1 << 16;
  static constexpr bool kFlip = true;
  static constexpr int kTokens = 4;
  static constexpr int halves(int) { return 2; }

  static void add(__m256i& sum, __m256i code, __m256i a) {
    const __m256i w = _mm256_xor_si256(code, _mm256_set1_epi8(static_cast<char>(128)));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(add_pairs(pairs)));
  }
  static __m256i whole(__m256i sum) { return sum; }
};

}  // namespace
}  // namespace nearfar

#include "dot_gemv_ymm.h"
