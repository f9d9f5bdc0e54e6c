// AVX2: 32 bytes a load; VPMADDUBSW (32 products) and the addition that it needs.
#include <immintrin.h>

#include "probe.h"

namespace nearfar {
namespace {

constexpr size_t kAhead = 2048;  // bytes; the hardware prefetcher stops at the end of a page

uint64_t read(const uint8_t* data, size_t n_bytes) {
  __m256i sum[8];
  for (__m256i& s : sum) s = _mm256_setzero_si256();
  for (size_t i = 0; i < n_bytes; i += 256) {
    for (int j = 0; j < 8; ++j) {
      if (j % 2 == 0) {
        _mm_prefetch(reinterpret_cast<const char*>(data + i + 32 * j) + kAhead, _MM_HINT_T0);
      }
      const auto* p = reinterpret_cast<const __m256i*>(data + i + 32 * j);
      sum[j] = _mm256_xor_si256(sum[j], _mm256_load_si256(p));
    }
  }
  for (int j = 1; j < 8; ++j) sum[0] = _mm256_xor_si256(sum[0], sum[j]);
  const __m128i half =
      _mm_xor_si128(_mm256_castsi256_si128(sum[0]), _mm256_extracti128_si256(sum[0], 1));
  return static_cast<uint64_t>(_mm_extract_epi64(half, 0) ^ _mm_extract_epi64(half, 1));
}

constexpr int kSums = 10;  // unrolled, or they stay in memory; six registers left

uint64_t multiply(int64_t n_steps) {
  __m256i sum[kSums], a = _mm256_set1_epi8(3);
  const __m256i b = _mm256_set1_epi8(5);
  for (__m256i& s : sum) s = _mm256_setzero_si256();
  for (int64_t step = 0; step < n_steps; ++step) {
#pragma GCC unroll 16
    for (__m256i& s : sum) {
      asm volatile("" : "+x"(a));  // `a` may have changed: the product is made anew
      s = _mm256_add_epi16(s, _mm256_maddubs_epi16(a, b));
    }
  }
  for (int j = 1; j < kSums; ++j) sum[0] = _mm256_add_epi16(sum[0], sum[j]);
  return static_cast<uint64_t>(_mm256_extract_epi64(sum[0], 0));
}

}  // namespace

const Probe avx2::kProbe = {"VPMADDUBSW ymm", int64_t{64} * kSums, read, multiply};

}  // namespace nearfar
