// The AVX2 + F16C build of ops_body.h.
#include <immintrin.h>

#include "ops.h"

namespace nearfar {
namespace {

constexpr int kWidth = 8;
typedef float Vec __attribute__((vector_size(32)));
typedef int32_t IntVec __attribute__((vector_size(32)));

inline Vec half_to_float(const uint16_t* p) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec byte_to_float(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
inline void float_to_half(Vec v, uint16_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace
}  // namespace nearfar

#include "ops_body.h"

namespace nearfar::avx2 {
const Ops kOps = kTable;
}
