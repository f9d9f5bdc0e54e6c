// Portable probes: whatever the compiler makes of plain loops.
#include <cstring>

#include "probe.h"

namespace nearfar {
namespace {

uint64_t read(const uint8_t* data, size_t n_bytes) {
  uint64_t sum[8] = {};  // a cache line a step; independent sums keep the loads in flight
  for (size_t i = 0; i < n_bytes; i += sizeof sum) {
    uint64_t words[8];
    std::memcpy(words, data + i, sizeof words);
    for (int j = 0; j < 8; ++j) sum[j] += words[j];
  }
  uint64_t total = 0;
  for (uint64_t s : sum) total += s;
  return total;
}

constexpr int kProducts = 4096;

uint64_t multiply(int64_t n_steps) {
  int8_t a[kProducts], b[kProducts];
  for (int i = 0; i < kProducts; ++i) {
    a[i] = static_cast<int8_t>(i);
    b[i] = static_cast<int8_t>(3 * i + 1);
  }
  uint64_t total = 0;
  for (int64_t step = 0; step < n_steps; ++step) {
    a[0] = static_cast<int8_t>(step);  // no two steps are the same, so none is left out
    int32_t sum = 0;
    for (int i = 0; i < kProducts; ++i) sum += a[i] * b[i];
    total += static_cast<uint32_t>(sum);
  }
  return total;
}

}  // namespace

const Probe ref::kProbe = {"scalar code", int64_t{2} * kProducts, read, multiply};

}  // namespace nearfar
