#include "bandwidth.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "quant.h"
#include "threads.h"

namespace nearfar {

double read_bandwidth(int n_threads, size_t n_bytes, int n_passes) {
  constexpr size_t kChunk = 1 << 20;  // bytes
  const auto n_chunks = static_cast<int64_t>(n_bytes / kChunk);
  if (n_chunks < 1 || n_passes < 1) {
    throw std::invalid_argument("read_bandwidth: expected at least 1 MiB and 1 pass");
  }
  ThreadPool pool(n_threads);
  AlignedBuffer buffer(n_chunks * kChunk);
  std::vector<uint64_t> sums(n_chunks);
  pool.run(n_chunks, [&](int64_t chunk, int) {
    std::memset(buffer.data() + chunk * kChunk, static_cast<int>(chunk & 0xff), kChunk);
  });
  double best_s = 1e30;
  for (int pass = 0; pass < n_passes; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    pool.run(n_chunks, [&](int64_t chunk, int) {
      const auto* words = reinterpret_cast<const uint64_t*>(buffer.data() + chunk * kChunk);
      uint64_t sum[8] = {};  // a cache line a step; independent sums keep the loads in flight
      for (size_t i = 0; i < kChunk / sizeof(uint64_t); i += 8) {
        for (size_t j = 0; j < 8; ++j) sum[j] += words[i + j];
      }
      for (size_t j = 0; j < 8; ++j) sums[chunk] += sum[j];
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best_s = std::min(best_s, elapsed.count());
  }
  volatile uint64_t sink = sums[0];  // keeps the sums, and so the reads, alive
  static_cast<void>(sink);
  return static_cast<double>(n_chunks * kChunk) / best_s / 1e9;
}

}  // namespace nearfar
