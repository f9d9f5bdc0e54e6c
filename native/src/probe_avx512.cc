// AVX-512: a cache line a load; VPDPBUSD on zmm, 64 products added to 16 sums.
#include <immintrin.h>

#include "probe.h"

// GCC 12 warns about its own header (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace nearfar {
namespace {

constexpr size_t kAhead = 2048;  // bytes; the hardware prefetcher stops at the end of a page

uint64_t folded(__m512i v) {
  uint64_t lane[8], all = 0;
  _mm512_storeu_si512(lane, v);
  for (uint64_t l : lane) all += l;
  return all;
}

uint64_t read(const uint8_t* data, size_t n_bytes) {
  __m512i sum[8];
  for (__m512i& s : sum) s = _mm512_setzero_si512();
  for (size_t i = 0; i < n_bytes; i += 512) {
    for (int j = 0; j < 8; ++j) {
      const uint8_t* p = data + i + 64 * j;
      _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead, _MM_HINT_T0);
      sum[j] = _mm512_xor_si512(sum[j], _mm512_load_si512(p));
    }
  }
  for (int j = 1; j < 8; ++j) sum[0] = _mm512_xor_si512(sum[0], sum[j]);
  return folded(sum[0]);
}

// Two a clock, five clocks of latency; unrolled, or they stay in memory. With 20 or with 12 GCC 12
// copies registers in between, which costs a fifth of the peak.
constexpr int kSums = 16;

uint64_t multiply(int64_t n_steps) {
  __m512i sum[kSums];
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  for (__m512i& s : sum) s = _mm512_setzero_si512();
  for (int64_t step = 0; step < n_steps; ++step) {
#pragma GCC unroll 32
    for (__m512i& s : sum) s = _mm512_dpbusd_epi32(s, a, b);
  }
  for (int j = 1; j < kSums; ++j) sum[0] = _mm512_add_epi32(sum[0], sum[j]);
  return folded(sum[0]);
}

}  // namespace

const Probe avx512::kProbe = {"VPDPBUSD zmm", int64_t{128} * kSums, read, multiply};

}  // namespace nearfar
