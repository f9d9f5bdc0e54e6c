// The checksum of panels: one number however it is computed, another one after any damage.
#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <random>
#include <set>

#include "checksum.h"

namespace nearfar::tests {
namespace {

std::vector<uint8_t> random_bytes(size_t n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<uint8_t> bytes(n);
  for (uint8_t& b : bytes) b = static_cast<uint8_t>(rng());
  return bytes;
}

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// One run, word after word.
uint64_t run_ref(const uint8_t* p, size_t n) {
  uint64_t h[16];
  for (int i = 0; i < 16; ++i) h[i] = mix(static_cast<uint64_t>(i) + 1);
  const auto word = [&](size_t at) {
    uint64_t d = 0;
    for (size_t j = at; j < at + 8 && j < n; ++j) d |= static_cast<uint64_t>(p[j]) << 8 * (j - at);
    return d;
  };
  for (size_t at = 0; at < n; at += 128) {
    for (int i = 0; i < 8; ++i) {
      uint64_t &x = h[i], &y = h[i + 8];
      x = (std::rotr(x, 8) + y) ^ word(at + 8 * i);
      y = (std::rotl(y, 3) ^ x) + word(at + 64 + 8 * i);
    }
  }
  uint64_t sum = mix(n);
  for (uint64_t lane : h) sum = mix(sum ^ lane);
  return sum;
}

uint64_t checksum_ref(const std::vector<uint8_t>& bytes) {
  constexpr size_t kMiB = 1 << 20;
  std::vector<uint64_t> sums;
  for (size_t at = 0; at < bytes.size(); at += kMiB) {
    sums.push_back(run_ref(&bytes[at], std::min(kMiB, bytes.size() - at)));
  }
  std::vector<uint8_t> words(sums.size() * 8);
  if (!sums.empty()) std::memcpy(words.data(), sums.data(), words.size());
  return mix(bytes.size() ^ run_ref(words.data(), words.size()));
}

constexpr size_t kSizes[] = {0,       1,      3, 17, 127, 128, 129, 1023, 4096, (1 << 20) - 1,
                             1 << 20, 3 << 20};

}  // namespace

TEST_CASE("the checksum is that of its definition") {
  for (size_t n : kSizes) {
    const auto bytes = random_bytes(n, 1);
    CHECK(checksum(bytes) == checksum_ref(bytes));
  }
}

TEST_CASE("any number of threads finds the checksums of one") {
  std::vector<std::vector<uint8_t>> parts;
  std::vector<std::span<const uint8_t>> views;
  for (size_t n : kSizes) parts.push_back(random_bytes(n, 2));
  for (const auto& part : parts) views.emplace_back(part);
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    const std::vector<uint64_t> found = checksums(views, pool);
    for (size_t i = 0; i < parts.size(); ++i) CHECK(found[i] == checksum(parts[i]));
    CHECK(checksums({}, pool).empty());
  }
}

TEST_CASE("every turned bit, every lost or added byte and every exchange makes another checksum") {
  auto bytes = random_bytes(4095, 3);
  std::set<uint64_t> seen = {checksum(bytes)};
  size_t n = 1;
  const auto look = [&] {
    seen.insert(checksum(bytes));
    ++n;
  };
  for (uint8_t& b : bytes) {
    for (int bit = 0; bit < 8; ++bit) {
      b ^= static_cast<uint8_t>(1 << bit);
      look();
      b ^= static_cast<uint8_t>(1 << bit);
    }
  }
  for (size_t i = 0; i + 136 <= bytes.size(); i += 8) {  // the words of one lane change places
    std::swap_ranges(&bytes[i], &bytes[i] + 8, &bytes[i] + 128);
    look();
    std::swap_ranges(&bytes[i], &bytes[i] + 8, &bytes[i] + 128);
  }
  bytes.push_back(0);
  look();
  bytes.pop_back();
  while (!bytes.empty()) {
    bytes.pop_back();
    look();
  }
  CHECK(seen.size() == n);
}

TEST_CASE("runs of zeros of different lengths differ") {
  std::set<uint64_t> seen;
  for (size_t n = 0; n < 2000; ++n) seen.insert(checksum(std::vector<uint8_t>(n)));
  CHECK(seen.size() == 2000);
}

}  // namespace nearfar::tests
