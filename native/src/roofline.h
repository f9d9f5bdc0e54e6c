// The machine's roofs, and how near to them the kernels come.
//
// A kernel that reads B bytes of weights for Q operations (a multiply-add is 2) runs at most at
// min(int8 peak, bandwidth * Q / B): the roofline model (Williams, Waterman and Patterson, 2009).
// Decoding reads every weight once a token and hangs under the bandwidth, prefill under the peak.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels.h"

namespace nearfar {

// Of which clock: of the wall, or of the process's CPU time divided by its threads, which on a busy
// machine leaves out what others took.
enum class Clock : uint8_t { kWall, kCpu };

// Gigabytes (1e9) a second that `n_threads` read together from a buffer of `n_bytes`, best of
// `n_passes`. Four times the last cache makes it memory bandwidth. The buffer is of the kind that
// weights lie in, and is freed at the end. Throws std::invalid_argument below 64 KiB or 1 pass,
// std::bad_alloc.
double read_bandwidth(const Kernels& k, int n_threads, size_t n_bytes, int n_passes = 5,
                      Clock clock = Clock::kWall);

// Giga-operations a second of int8 multiply-adds that `n_threads` reach together on registers, best
// of `n_passes` of about 20 ms. Throws std::invalid_argument below 1 pass.
double int8_peak(const Kernels& k, int n_threads, int n_passes = 5, Clock clock = Clock::kWall);

// The instruction that int8_peak measures.
std::string int8_multiplier(const Kernels& k);

struct ProductSpeed {
  int64_t rows;
  size_t n_bytes;          // of panels
  double seconds;          // of one product, median
  double fastest_seconds;  // of the samples
};

// How long y = W x of `m` rows takes, W of random codes and about `n_bytes` (at least a panel),
// `cols` wide, panels of `kind`. The panels are read in turn: from which cache they come follows
// from `n_bytes`. Throws std::invalid_argument on sizes that do not fit or kL3 where the ISA has no
// lookups, std::bad_alloc.
struct Product {
  PanelKind kind = PanelKind::kI2;
  int64_t cols = 2560;  // a multiple of 256
  size_t n_bytes = 0;
  int64_t m = 1;
  int n_threads = 1;
  double seconds = 0.3;  // to measure for; at least three samples are taken
};
ProductSpeed product_speed(const Kernels& k, const Product& p, Clock clock = Clock::kWall);

}  // namespace nearfar
