#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "buffer.h"
#include "quant.h"
#include "roofline.h"

namespace nearfar::tests {
namespace {

TEST_CASE("every reader reads every byte") {
  constexpr size_t kBytes = 8192;
  AlignedBuffer buffer(kBytes + 4096);  // what a reader fetches ahead may lie behind
  for (std::string_view isa : isas_available()) {
    const auto read = probe(kernels(isa)).read;
    const uint64_t none = read(buffer.data(), kBytes);
    for (size_t at = 0; at < kBytes; at += 61) {
      buffer.data()[at] = 1;
      CHECK(read(buffer.data(), kBytes) != none);
      buffer.data()[at] = 0;
    }
  }
}

TEST_CASE("multiplying on and on gives another result: nothing was left out") {
  for (std::string_view isa : isas_available()) {
    const Probe& p = probe(kernels(isa));
    CHECK(p.multiply(1) != p.multiply(4));
    CHECK(p.ops_per_step > 0);
    CHECK(!int8_multiplier(kernels(isa)).empty());
  }
}

TEST_CASE("roofs are measured by either clock") {
  for (std::string_view isa : isas_available()) {
    for (const Clock clock : {Clock::kWall, Clock::kCpu}) {
      CHECK(read_bandwidth(kernels(isa), 2, 4 << 20, 1, clock) > 0);
      CHECK(int8_peak(kernels(isa), 2, 1, clock) > 0);
    }
  }
}

TEST_CASE("a product of every kind is measured, and says how many bytes it reads") {
  const Kernels& k = kernels();
  for (int i = 0; i < kPanelKinds; ++i) {
    Product p;
    p.kind = static_cast<PanelKind>(i);
    if (p.kind == PanelKind::kL3 && k.lut_tables == nullptr) continue;
    p.cols = 512;
    p.n_bytes = 300'000;
    p.m = 2;
    p.seconds = 0;
    CAPTURE(kind_name(p.kind));
    const ProductSpeed s = product_speed(k, p);
    CHECK(s.rows % kPanelRows == 0);
    CHECK(s.n_bytes <= p.n_bytes);
    CHECK(2 * s.n_bytes > p.n_bytes);
    CHECK(s.seconds >= s.fastest_seconds);
    CHECK(s.fastest_seconds > 0);
  }
}

TEST_CASE("what cannot be measured is refused") {
  const Kernels& k = kernels();
  CHECK_THROWS_AS(read_bandwidth(k, 1, 1000), std::invalid_argument);
  CHECK_THROWS_AS(read_bandwidth(k, 1, 1 << 20, 0), std::invalid_argument);
  CHECK_THROWS_AS(int8_peak(k, 1, 0), std::invalid_argument);
  Product p;
  p.m = 0;
  CHECK_THROWS_AS(product_speed(k, p), std::invalid_argument);
  p.m = 1, p.cols = 100;
  CHECK_THROWS_AS(product_speed(k, p), std::invalid_argument);
  Kernels without_lookups = k;
  without_lookups.lut_tables = nullptr;
  p.cols = 256, p.kind = PanelKind::kL3;
  CHECK_THROWS_AS(product_speed(without_lookups, p), std::invalid_argument);
}

}  // namespace
}  // namespace nearfar::tests
