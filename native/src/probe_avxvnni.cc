// AVX-VNNI: VPDPBUSD on ymm, 32 products added to 8 sums; reading is AVX2's.
#include <immintrin.h>

#include "probe.h"

namespace nearfar {
namespace {

constexpr int kSums = 12;  // two a clock, five clocks of latency; unrolled, or they stay in memory

uint64_t multiply(int64_t n_steps) {
  __m256i sum[kSums];
  const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
#pragma GCC unroll 16
  for (int j = 0; j < kSums; ++j) sum[j] = _mm256_setzero_si256();
  for (int64_t step = 0; step < n_steps; ++step) {
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) {
      asm volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum[j]) : "x"(a), "x"(b));
    }
  }
#pragma GCC unroll 16
  for (int j = 1; j < kSums; ++j) sum[0] = _mm256_add_epi32(sum[0], sum[j]);
  return static_cast<uint64_t>(_mm256_extract_epi64(sum[0], 0));
}

uint64_t read(const uint8_t* data, size_t n_bytes) { return avx2::kProbe.read(data, n_bytes); }

}  // namespace

const Probe avxvnni::kProbe = {"VPDPBUSD ymm", int64_t{64} * kSums, read, multiply};

}  // namespace nearfar
