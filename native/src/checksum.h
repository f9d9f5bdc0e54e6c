// A checksum of bytes at the speed of memory: tells damage, not malice.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "threads.h"

namespace nearfar {

// The same number on every machine, by any number of threads.
//
// Bytes are read as little-endian u64, the end filled up with zeros, 128 bytes a step: words
// d[0..7] and e[0..7] go to eight pairs (x, y) of 64-bit lanes, each of which does a round of the
// cipher Speck (Beaulieu et al., 2013, eprint 404) with the words for a key:
//   x = ((x >>> 8) + y) xor d;  y = ((y <<< 3) xor x) + e
// Additions, shifts and xors of 64 bits are what every vector unit has.  A round is a bijection of
// (d, e) for a given state and of the state for given words, so damage within one pair of words is
// always told, any other with probability 1 - 2^-64.  (Cheaper steps that only shift and add undo
// themselves: x + (x << 13) four times over moves most low bits nowhere.)  Chunks of 1 MiB are
// summed up each on its own, then their sums as one more run of words; lanes and length are mixed
// in at the end.
uint64_t checksum(std::span<const uint8_t> bytes);

// One checksum for each of `parts`, chunks shared between the threads of the pool.
std::vector<uint64_t> checksums(std::span<const std::span<const uint8_t>> parts, ThreadPool& pool);

}  // namespace nearfar
