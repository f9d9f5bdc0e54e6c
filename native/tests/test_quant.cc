// File blocks against the `gguf` package, panels against blocks, activations against their
// equation.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "activations.h"
#include "made_tensor.h"

namespace nearfar::tests {
namespace {

uint32_t crc32(const void* data, size_t n) {
  uint32_t crc = ~0u;
  for (size_t i = 0; i < n; ++i) {
    crc ^= static_cast<const uint8_t*>(data)[i];
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0u);
  }
  return ~crc;
}

std::vector<float> dequantize(const MadeTensor& t) {
  std::vector<float> out(t.rows * t.cols);
  for (int64_t n = 0; n < t.rows; ++n) {
    dequantize_row(t.raw(), n, std::span(out).subspan(n * t.cols, t.cols));
  }
  return out;
}

std::vector<float> unpack(const PackedMat& m) {
  std::vector<float> out(m.rows * m.cols);
  for (int64_t n = 0; n < m.rows; ++n) {
    unpack_row(m, n, std::span(out).subspan(n * m.cols, m.cols));
  }
  return out;
}

// Made by golden_blocks.py.
struct Golden {
  TensorType type;
  uint32_t crc;
};
constexpr Golden kGolden[] = {
    {TensorType::kF16, 0xf45450d3u},   {TensorType::kBF16, 0x6ac8471au},
    {TensorType::kQ4_0, 0x800eaae2u},  {TensorType::kQ4_1, 0x7d278feau},
    {TensorType::kQ8_0, 0x3e5b6e8au},  {TensorType::kQ2_K, 0xec10ba58u},
    {TensorType::kQ3_K, 0x67d88fb3u},  {TensorType::kQ4_K, 0xabc98685u},
    {TensorType::kQ5_K, 0xa70ad10au},  {TensorType::kQ6_K, 0x0ccdcba9u},
    {TensorType::kTQ1_0, 0x128a55c7u}, {TensorType::kTQ2_0, 0xcbc03cc7u},
};

TEST_CASE("dequantized rows have the bits that the gguf package gives") {
  for (const Golden& golden : kGolden) {
    MadeTensor t{golden.type, 8, 512, std::vector<uint8_t>(8 * row_bytes(golden.type, 512))};
    uint32_t state = 1;
    for (uint8_t& byte : t.bytes) {
      state = state * 1664525u + 1013904223u;
      byte = static_cast<uint8_t>(state >> 24);
    }
    const auto size = static_cast<size_t>(block_shape(t.type).bytes);
    ScaleOffsets at = scale_offsets(t.type);
    if (at.d < 0) at.d = 0;
    for (size_t i = 0; i < t.bytes.size(); i += size) {
      t.bytes[i + at.d + 1] &= 0xbf;
      if (at.dmin >= 0) t.bytes[i + at.dmin + 1] &= 0xbf;
    }
    const std::vector<float> values = dequantize(t);
    CHECK_MESSAGE(crc32(values.data(), values.size() * sizeof(float)) == golden.crc, t.name());
  }
}

TEST_CASE("f16 converts to f32 and back without a change, and rounds to even") {
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const float f = f16_to_f32(static_cast<uint16_t>(h));
    if (std::isnan(f)) continue;
    REQUIRE(f32_to_f16(f) == h);
  }
  CHECK(f16_to_f32(0x0001) == 0x1p-24f);
  CHECK(f16_to_f32(0xfbff) == -65504.0f);
  CHECK(std::isinf(f16_to_f32(0x7c00)));
  CHECK(std::isnan(f16_to_f32(0x7c01)));
  CHECK(f32_to_f16(1.0f + 0x1p-11f) == 0x3c00);             // tie, down to even
  CHECK(f32_to_f16(1.0f + 0x1p-10f + 0x1p-11f) == 0x3c02);  // tie, up to even
  CHECK(f32_to_f16(1.0f + 0x1p-11f + 0x1p-20f) == 0x3c01);  // above the tie
  CHECK(f32_to_f16(65519.0f) == 0x7bff);
  CHECK(f32_to_f16(-65520.0f) == 0xfc00);
  CHECK(f32_to_f16(0x1p-25f) == 0);  // tie at the smallest denormal
  CHECK(f32_to_f16(0x1.8p-25f) == 1);
  CHECK((f32_to_f16(std::nanf("")) & 0x7fff) > 0x7c00);
}

TEST_CASE("a packed matrix holds the values of the file") {
  for (TensorType type : kTypes) {
    for (int64_t rows : {1, 3, 17, 63, 64, 65, 130}) {
      for (int64_t cols : columns(type)) {
        for (bool one_scale_a_row : {true, false}) {
          const MadeTensor t = make_tensor(type, rows, cols, 7, one_scale_a_row);
          for (bool five_trits : {false, true}) {
            const PackedMat m = pack(t.raw(), 1.0f, five_trits ? PanelKind::kT5 : PanelKind::kI2);
            REQUIRE(m.data.size() == static_cast<size_t>(m.n_panels() * m.panel_bytes));
            REQUIRE_MESSAGE(unpack(m) == dequantize(t), t.name());
          }
        }
      }
    }
  }
}

TEST_CASE("a packed matrix stands on kept bytes as on its own") {
  for (TensorType type : kTypes) {
    const MadeTensor t = make_tensor(type, 65, columns(type)[1], 7);
    const PackedMat made = pack(t.raw(), 0.5f);
    const KeptPanels kept = {kind_named(kind_name(made.kind)),
                             t.rows,
                             t.cols,
                             0.5f,
                             {made.data.data(), made.data.size()},
                             {made.row_scales.data(), made.row_scales.size()}};
    const PackedMat m = packed_from(kept);
    CHECK(m.data.data() == made.data.data());
    CHECK(m.view().scale == 0.5f);
    CHECK_MESSAGE(unpack(m) == dequantize(t), t.name());
    // Sizes that are not those of the bytes.
    const auto refused = [&](auto change) {
      KeptPanels changed = kept;
      change(changed);
      CHECK_THROWS_AS(packed_from(changed), std::invalid_argument);
    };
    refused([](KeptPanels& k) { k.rows -= 1; });
    refused([](KeptPanels& k) { k.rows += 64; });
    refused([](KeptPanels& k) { k.cols += 256; });
    refused([](KeptPanels& k) { k.cols = 0; });
    refused([](KeptPanels& k) { k.rows = k.cols = int64_t{1} << 40; });
    refused([](KeptPanels& k) { k.scale = NAN; });
    refused([](KeptPanels& k) { k.data = k.data.subspan(1); });
    refused([](KeptPanels& k) { k.data = k.data.first(k.data.size() - 64); });
    refused([](KeptPanels& k) {
      k.row_scales = k.row_scales.empty() ? k.data.first(64) : k.row_scales.first(64);
    });
    if (block_shape(type).weights > 1) refused([](KeptPanels& k) { k.cols += 1; });
  }
  CHECK_THROWS_AS(kind_named("i3"), std::invalid_argument);
}

TEST_CASE("five trits a byte, where they are allowed, every row has one scale and no code is 3") {
  const auto kind = [](const MadeTensor& t) { return pack(t.raw(), 1.0f, PanelKind::kT5).kind; };
  CHECK(kind(make_tensor(TensorType::kTQ1_0, 5, 512, 1, true)) == PanelKind::kT5);
  CHECK(kind(make_tensor(TensorType::kTQ1_0, 5, 512, 1, false)) == PanelKind::kI2Blocks);
  CHECK(kind(make_tensor(TensorType::kTQ2_0, 5, 512, 1, true)) == PanelKind::kI2);  // has codes 3
}

TEST_CASE("ternary rows with one scale take i2 panels, others i2_blocks") {
  for (TensorType type : {TensorType::kTQ1_0, TensorType::kTQ2_0}) {
    CHECK(pack(make_tensor(type, 5, 512, 1, true).raw()).kind == PanelKind::kI2);
    CHECK(pack(make_tensor(type, 5, 512, 1, false).raw()).kind == PanelKind::kI2Blocks);
  }
}

TEST_CASE("ternary blocks that are zero do not count as another scale") {
  MadeTensor t = make_tensor(TensorType::kTQ2_0, 3, 768, 1);
  set_scales(t, 0.5f, 0);
  put_f16(&t.bytes[66 + 64], 0.0f);                  // row 0, block 1: d = 0 under random codes
  std::fill_n(&t.bytes[3 * 66], 64, uint8_t{0x55});  // row 1, block 0: trits all zero
  put_f16(&t.bytes[3 * 66 + 64], 3.0f);
  const PackedMat m = pack(t.raw());
  CHECK(m.kind == PanelKind::kI2);
  CHECK(unpack(m) == dequantize(t));
}

TEST_CASE("a matrix of zeros packs") {
  MadeTensor t = make_tensor(TensorType::kTQ1_0, 2, 256, 1);
  set_scales(t, 0.0f, 0);
  CHECK(unpack(pack(t.raw())) == std::vector<float>(512, 0.0f));
}

TEST_CASE("code 3 of TQ2_0 means +2") {
  MadeTensor t = make_tensor(TensorType::kTQ2_0, 1, 256, 1);
  std::fill_n(t.bytes.begin(), 64, uint8_t{0xff});
  set_scales(t, 0.25f, 0);
  CHECK(dequantize(t) == std::vector<float>(256, 0.5f));
  CHECK(unpack(pack(t.raw())) == std::vector<float>(256, 0.5f));
}

TEST_CASE("a tensor that is not what it says is refused") {
  for (TensorType type : kTypes) {
    const MadeTensor t = make_tensor(type, 3, columns(type)[1], 1);
    std::vector<float> out(t.cols);
    RawTensor raw = t.raw();
    raw.bytes = raw.bytes.first(raw.bytes.size() - 1);
    CHECK_THROWS_AS(pack(raw), std::invalid_argument);
    CHECK_THROWS_AS(dequantize_row(raw, 0, out), std::invalid_argument);
    raw = t.raw();
    raw.rows = 4;
    CHECK_THROWS_AS(pack(raw), std::invalid_argument);
    for (int64_t rows : {int64_t{0}, int64_t{-3}, std::numeric_limits<int64_t>::max()}) {
      raw.rows = rows;
      CHECK_THROWS_AS(pack(raw), std::invalid_argument);
    }
    raw = t.raw();
    for (int64_t cols : {int64_t{0}, -t.cols, t.cols + 1, std::numeric_limits<int64_t>::max()}) {
      raw.cols = cols;
      CHECK_THROWS_AS(pack(raw), std::invalid_argument);
    }
    CHECK_THROWS_AS(dequantize_row(t.raw(), 3, out), std::invalid_argument);
    CHECK_THROWS_AS(dequantize_row(t.raw(), -1, out), std::invalid_argument);
    out.pop_back();
    CHECK_THROWS_AS(dequantize_row(t.raw(), 0, out), std::invalid_argument);
  }
  const std::vector<uint8_t> bytes(66);  // one block of IQ2_XXS
  CHECK_THROWS_AS(pack({static_cast<TensorType>(16), 1, 256, bytes}), std::invalid_argument);
  const std::vector<uint8_t> wide(row_bytes(TensorType::kTQ2_0, 1 << 19));
  CHECK_THROWS_AS(pack({TensorType::kTQ2_0, 1, 1 << 19, wide}), std::invalid_argument);
}

TEST_CASE("a scale that is not finite is refused") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (TensorType type : kTypes) {
    const ScaleOffsets at = scale_offsets(type);
    for (int offset : {at.d, at.dmin}) {
      if (offset < 0) continue;
      MadeTensor t = make_tensor(type, 3, columns(type)[1], 1);
      put_f16(&t.bytes[t.bytes.size() - block_shape(type).bytes + offset], kInfinity);
      CHECK_THROWS_AS(pack(t.raw()), std::invalid_argument);
      put_f16(&t.bytes[t.bytes.size() - block_shape(type).bytes + offset], std::nanf(""));
      CHECK_THROWS_AS(pack(t.raw()), std::invalid_argument);
    }
    CHECK_THROWS_AS(pack(make_tensor(type, 1, 256, 1).raw(), kInfinity), std::invalid_argument);
  }
}

std::vector<float> random_rows(int64_t n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(rng);
  return x;
}

TEST_CASE("activations are rounded per group as their equation says") {
  constexpr int64_t kRows = 3, kCols = 768;
  std::vector<float> x = random_rows(kRows * kCols, 5);
  std::fill_n(x.begin() + 256, 256, 0.0f);  // a group of zeros
  x[600] = 40.0f;                           // an outlier
  x[kCols + 40] = -3.5f;                    // the largest of its group, negative
  for (int grain : {0, 32, 256}) {
    QuantRows rows;
    quantize_rows(x, kRows, kCols, grain, rows);
    const Rows r = rows.view();
    const int64_t group = grain ? grain : kCols;
    const int64_t run = grain == 0 ? 256 : grain == 32 ? 32 : 16;
    REQUIRE(r.n_scales == kCols / group);
    REQUIRE(r.n_sums == kCols / run);
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t g = 0; g < r.n_scales; ++g) {
        const float* xs = &x[i * kCols + g * group];
        float max = 0;
        for (int64_t k = 0; k < group; ++k) max = std::max(max, std::fabs(xs[k]));
        const float s = max / 127.0f;
        CHECK(r.scales[i * r.n_scales + g] == (grain == 32 ? f16_to_f32(f32_to_f16(s)) : s));
        for (int64_t k = 0; k < group; ++k) {
          const float q = max == 0 ? 0.0f : std::nearbyintf(xs[k] * (127.0f / max));
          REQUIRE(r.q[i * r.q_stride + g * group + k] == static_cast<int>(q));
        }
      }
      for (int64_t j = 0; j < r.n_sums; ++j) {
        int sum = 0;
        for (int64_t k = 0; k < run; ++k) sum += r.q[i * r.q_stride + j * run + k];
        CHECK(r.sums[i * r.n_sums + j] == sum);
      }
    }
  }
}

TEST_CASE("activations never reach -128, whatever their size") {
  QuantRows rows;
  std::vector<float> x(256);
  std::mt19937 rng(3);
  for (int trial = 0; trial < 4000; ++trial) {
    const float size = std::ldexp(1.0f, trial % 240 - 118);
    for (float& v : x) v = size * (static_cast<float>(rng() % 2001) / 1000.0f - 1.0f);
    x[trial % 256] = trial % 2 ? size : -size;
    quantize_rows(x, 1, 256, 256, rows);
    const Rows r = rows.view();
    int least = 0, most = 0;
    for (int k = 0; k < 256; ++k) {
      least = std::min<int>(least, r.q[k]);
      most = std::max<int>(most, r.q[k]);
    }
    REQUIRE(least >= -127);
    REQUIRE(std::max(most, -least) == 127);
  }
}

TEST_CASE("activations too small to divide by become zeros") {
  QuantRows rows;
  const std::vector<float> x(256, 0x1p-121f);
  for (int grain : {0, 32, 256}) {
    quantize_rows(x, 1, 256, grain, rows);
    CHECK(rows.view().scales[0] == 0.0f);
    CHECK(rows.view().q[17] == 0);
    CHECK(rows.view().sums[0] == 0);
  }
}

TEST_CASE("activations that are not finite are refused") {
  QuantRows rows;
  for (float bad : {std::nanf(""), -std::nanf(""), std::numeric_limits<float>::infinity(),
                    -std::numeric_limits<float>::infinity()}) {
    for (int grain : {0, 32, 256}) {
      std::vector<float> x(512, 1.0f);
      x[300] = bad;
      CHECK_THROWS_AS(quantize_rows(x, 1, 512, grain, rows), std::invalid_argument);
    }
  }
}

TEST_CASE("float activations stay as they are") {
  QuantRows rows;
  const std::vector<float> x = random_rows(2 * 17, 1);
  quantize_rows(x, 2, 17, kGrainFloat, rows);
  const Rows r = rows.view();
  CHECK(std::equal(x.begin(), x.begin() + 17, r.x));
  CHECK(std::equal(x.begin() + 17, x.end(), r.x + r.x_stride));
}

TEST_CASE("activations of the wrong shape or grain are refused") {
  QuantRows rows;
  const std::vector<float> x(512);
  CHECK_THROWS_AS(rows.reset(1, 512, 64), std::invalid_argument);
  CHECK_THROWS_AS(rows.reset(1, 500, 256), std::invalid_argument);
  CHECK_THROWS_AS(rows.reset(1, 500, kGrainTables), std::invalid_argument);
  CHECK_THROWS_AS(rows.reset(1, 0, kGrainFloat), std::invalid_argument);
  CHECK_THROWS_AS(rows.reset(-1, 512, 0), std::invalid_argument);
  CHECK_THROWS_AS(quantize_rows(x, 2, 512, 0, rows), std::invalid_argument);
  rows.reset(2, 256, 32);
  CHECK_THROWS_AS(rows.quantize_row(x, 0), std::invalid_argument);
  CHECK_THROWS_AS(rows.quantize_row(std::span(x).first(256), 2), std::invalid_argument);
}

TEST_CASE("one QuantRows serves inputs of any size and grain in turn") {
  QuantRows rows;
  const std::vector<float> x = random_rows(4 * 1024, 2);
  quantize_rows(x, 4, 1024, 32, rows);
  quantize_rows(std::span(x).first(256), 1, 256, 256, rows);
  QuantRows fresh;
  quantize_rows(std::span(x).first(256), 1, 256, 256, fresh);
  CHECK(std::equal(fresh.view().q, fresh.view().q + 256, rows.view().q));
  CHECK(rows.view().scales[0] == fresh.view().scales[0]);
  CHECK(std::equal(fresh.view().sums, fresh.view().sums + 16, rows.view().sums));
}

}  // namespace
}  // namespace nearfar::tests
