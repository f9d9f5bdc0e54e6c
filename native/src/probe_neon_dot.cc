// ARM with dotprod: 16 bytes a load; SDOT, 16 products added to 4 sums.
#include <arm_neon.h>

#include "probe.h"

namespace nearfar {
namespace {

constexpr size_t kAhead = 2048;  // bytes

uint64_t read(const uint8_t* data, size_t n_bytes) {
  uint8x16_t sum[8];
  for (uint8x16_t& s : sum) s = vdupq_n_u8(0);
  for (size_t i = 0; i < n_bytes; i += 128) {
    __builtin_prefetch(data + i + kAhead);
    __builtin_prefetch(data + i + kAhead + 64);
    for (int j = 0; j < 8; ++j) sum[j] = veorq_u8(sum[j], vld1q_u8(data + i + 16 * j));
  }
  for (int j = 1; j < 8; ++j) sum[0] = veorq_u8(sum[0], sum[j]);
  return vaddvq_u64(vreinterpretq_u64_u8(sum[0]));
}

constexpr int kSums = 24;  // four a clock, four clocks of latency; unrolled, or they stay in memory

uint64_t multiply(int64_t n_steps) {
  int32x4_t sum[kSums];
  int8x16_t a = vdupq_n_s8(3);
  const int8x16_t b = vdupq_n_s8(5);
  for (int32x4_t& s : sum) s = vdupq_n_s32(0);
  for (int64_t step = 0; step < n_steps; ++step) {
    asm volatile("" : "+w"(a));  // `a` may have changed: the products are made anew
#pragma GCC unroll 32
    for (int32x4_t& s : sum) s = vdotq_s32(s, a, b);
  }
  for (int j = 1; j < kSums; ++j) sum[0] = vaddq_s32(sum[0], sum[j]);
  return static_cast<uint64_t>(vaddvq_s32(sum[0]));
}

}  // namespace

const Probe neon_dot::kProbe = {"SDOT", int64_t{32} * kSums, read, multiply};

}  // namespace nearfar
