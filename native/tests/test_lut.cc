// Products by lookup: every ISA gives the bits of `ref`, and `ref` stays within its stated error.
#include <doctest/doctest.h>

#include <cmath>

#include "kernels.h"
#include "lut_gemv.h"
#include "made_tensor.h"

namespace nearfar::tests {
namespace {

// y is the product of three roundings, its error bound of as many.
constexpr double kFloatSlack = 1 + 0x1p-20;

std::vector<std::string_view> isas_with_lookups() {
  std::vector<std::string_view> names;
  for (std::string_view isa : isas_available()) {
    if (kernels(isa).lut_tables != nullptr) names.push_back(isa);
  }
  return names;
}

MadeTensor ternary(int64_t rows, int64_t cols, uint32_t seed) {
  return make_tensor(TensorType::kTQ1_0, rows, cols, seed);
}

std::vector<float> normal_rows(int64_t n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(rng);
  return x;
}

// Normal numbers, a few of them 30 times as large: what rounds the others to little.
std::vector<float> rows_with_outliers(int64_t n, uint32_t seed) {
  std::vector<float> x = normal_rows(n, seed);
  for (int64_t i = 0; i < n; i += 211) x[i] *= 30;
  return x;
}

QuantRows quantized(const Kernels& k, std::span<const float> x, int64_t m, int64_t cols) {
  QuantRows rows;
  rows.reset(m, cols, kGrainTables);
  for (int64_t i = 0; i < m; ++i)
    rows.quantize_row(x.subspan(i * cols, cols), i, *k.ops, k.lut_tables);
  return rows;
}

std::vector<float> product(const Kernels& k, const PackedMat& w, std::span<const float> x,
                           int64_t m) {
  const QuantRows rows = quantized(k, x, m, w.cols);
  std::vector<float> y(m * w.rows, -1.0f);
  matmul(k, w, rows, y);
  return y;
}

std::vector<float> exact_product(const PackedMat& w, std::span<const float> x, int64_t m) {
  QuantRows rows;
  quantize_rows(x, m, w.cols, w.grain(), rows);
  std::vector<float> y(m * w.rows);
  matmul(kernels(), w, rows, y);
  return y;
}

TEST_CASE("a code's trits are those it is made of") {
  for (int t2 = -1; t2 <= 1; ++t2) {
    for (int t1 = -1; t1 <= 1; ++t1) {
      for (int t0 = -1; t0 <= 1; ++t0) {
        const int code = t0 + 3 * t1 + 9 * t2;
        if (code < 0) continue;
        CHECK(lut_trit(code, 0) == t0);
        CHECK(lut_trit(code, 1) == t1);
        CHECK(lut_trit(code, 2) == t2);
      }
    }
  }
}

TEST_CASE("lookup panels hold the trits of the file") {
  for (TensorType type : {TensorType::kTQ1_0, TensorType::kTQ2_0}) {
    for (int64_t k : {256, 512, 768, 1280}) {
      MadeTensor t = make_tensor(type, 70, k, 5);
      if (type == TensorType::kTQ2_0) {  // no code 3
        for (size_t i = 0; i < t.bytes.size(); ++i) {
          if (i % 66 < 64) t.bytes[i] &= static_cast<uint8_t>(~(t.bytes[i] >> 1 & 0x55));
        }
      }
      const PackedMat lut = pack(t.raw(), 0.5f, PanelKind::kL3), codes = pack(t.raw(), 0.5f);
      REQUIRE(lut.kind == PanelKind::kL3);
      std::vector<float> a(k), b(k);
      for (int64_t n = 0; n < t.rows; ++n) {
        unpack_row(lut, n, a);
        unpack_row(codes, n, b);
        REQUIRE(a == b);
      }
    }
  }
}

TEST_CASE("what is not ternary with one scale a row stays as it is") {
  const MadeTensor scales = make_tensor(TensorType::kTQ1_0, 3, 512, 6, false);
  CHECK(pack(scales.raw(), 1.0f, PanelKind::kL3).kind == PanelKind::kI2Blocks);
  const MadeTensor code3 = make_tensor(TensorType::kTQ2_0, 3, 512, 6);  // random bits: some +2
  CHECK(pack(code3.raw(), 1.0f, PanelKind::kL3).kind == PanelKind::kI2);
  const MadeTensor q8 = make_tensor(TensorType::kQ8_0, 3, 512, 6);
  CHECK(pack(q8.raw(), 1.0f, PanelKind::kL3).kind == PanelKind::kInt8);
}

TEST_CASE("a table holds the rounded sums of its three activations") {
  const std::vector<float> x = normal_rows(512, 7);
  for (std::string_view isa : isas_with_lookups()) {
    const QuantRows rows = quantized(kernels(isa), x, 1, 512);
    const Rows r = rows.view();
    const auto q = [&](int64_t k) { return k < 512 ? int{r.q[k]} : 0; };
    const double step = double{r.table_scales[0]} / r.scales[0];
    CHECK(step > 1);
    double worst = 0;
    for (int64_t g = 0; g < lut_units(512) * 32; ++g) {
      for (int code = 0; code < kLutCodes; ++code) {
        int sum = 0;
        for (int i = 0; i < 3; ++i) sum += lut_trit(code, i) * q(3 * g + i);
        const double off = r.tables[16 * g + code] - 128 - sum / step;
        worst = std::max(worst, std::fabs(off));
        if (code == 0) CHECK(off == 0);
      }
    }
    CHECK(worst <= kLutEntryError);
    CHECK(worst > 0.4);  // the bound is tight
  }
}

TEST_CASE("every ISA makes the tables of ref and multiplies to its bits") {
  for (std::string_view isa : isas_with_lookups()) {
    for (int64_t k : {256, 512, 768, 1280, 2560, 7168}) {
      for (int64_t n : {1, 3, 17, 63, 64, 65, 130, 300}) {
        if (k > 1280 && n != 65) continue;
        const PackedMat w = pack(ternary(n, k, 11).raw(), 1.25f, PanelKind::kL3);
        const std::vector<float> x = rows_with_outliers(17 * k, 12);
        const QuantRows a = quantized(kernels("ref"), x, 17, k);
        const QuantRows b = quantized(kernels(isa), x, 17, k);
        REQUIRE(std::equal(a.view().tables, a.view().tables + 17 * a.view().tables_stride,
                           b.view().tables));
        std::vector<float> truth(17 * n);
        matmul(kernels("ref"), w, a, truth);
        for (int64_t m = 1; m <= 17; ++m) {
          const std::vector<float> y = product(kernels(isa), w, std::span(x).first(m * k), m);
          const bool same = std::equal(y.begin(), y.end(), truth.begin());
          REQUIRE_MESSAGE(same, isa << " [" << n << ", " << k << "] times " << m << " rows");
        }
      }
    }
  }
}

TEST_CASE("a lookup product is as near to the exact one as it says") {
  constexpr int64_t kN = 130, kM = 5;
  for (std::string_view isa : isas_with_lookups()) {
    for (int64_t k : {256, 2560, 6912}) {
      const MadeTensor t = ternary(kN, k, 21);
      const PackedMat w = pack(t.raw(), 0.75f, PanelKind::kL3), exact = pack(t.raw(), 0.75f);
      for (bool outliers : {false, true}) {
        const std::vector<float> x =
            outliers ? rows_with_outliers(kM * k, 22) : normal_rows(kM * k, 22);
        const std::vector<float> y = product(kernels(isa), w, x, kM);
        const std::vector<float> z = exact_product(exact, x, kM);
        const QuantRows rows = quantized(kernels(isa), x, kM, k);
        double error = 0, size = 0;
        for (int64_t i = 0; i < kM; ++i) {
          for (int64_t n = 0; n < kN; ++n) {
            const double unit =
                std::fabs(w.view().row_scales[n] * rows.view().table_scales[i] * w.scale);
            const double groups = std::ceil(static_cast<double>(k) / kLutGroup);
            const double off = double{y[i * kN + n]} - z[i * kN + n];
            REQUIRE(std::fabs(off) <= unit * kLutEntryError * groups * kFloatSlack);
            error += off * off;
            size += double{z[i * kN + n]} * z[i * kN + n];
          }
        }
        CHECK(error > 0);
        CHECK(std::sqrt(error / size) < (outliers ? 0.08 : 0.02));
      }
    }
  }
}

TEST_CASE("where no sum of three leaves 8 bits, a lookup product is exact") {
  constexpr int64_t kN = 70, kK = 1280;
  const MadeTensor t = ternary(kN, kK, 31);
  const PackedMat w = pack(t.raw(), 0.75f, PanelKind::kL3), exact = pack(t.raw(), 0.75f);
  std::vector<float> x = normal_rows(2 * kK, 32);
  for (int64_t k = 0; k < 2 * kK; ++k) x[k] = k % kK % 3 == 1 ? x[k] : 0;
  for (std::string_view isa : isas_with_lookups()) {
    CHECK(product(kernels(isa), w, x, 2) == exact_product(exact, x, 2));
  }
}

TEST_CASE("sums of lookups at the extremes fit") {
  for (std::string_view isa : isas_with_lookups()) {
    for (int64_t k : {int64_t{256}, int64_t{6912}, int64_t{1} << 18}) {
      for (int weight : {-1, 0, 1}) {
        MadeTensor t{TensorType::kTQ2_0, 65, k, {}};
        t.bytes.assign(65 * row_bytes(t.type, k), static_cast<uint8_t>((weight + 1) * 0x55));
        set_scales(t, 1.0f, 0.0f);
        const PackedMat w = pack(t.raw(), 1.0f, PanelKind::kL3);
        for (int sign : {-1, 1}) {
          // Groups of +-127 are the largest there are: entry 13 is 255 or 1, and stands for 381.
          const int64_t m = isa == "ref" ? 1 : 9;  // equal rows; ref is slow and sums one by one
          const std::vector<float> x(m * k, 127.0f * sign);
          const double whole = 127.0 * sign * weight * static_cast<double>(k);
          const std::vector<float> y = product(kernels(isa), w, x, m);
          const std::vector<float> truth = product(kernels("ref"), w, std::span(x).first(k), 1);
          for (int64_t i = 0; i < m; ++i) {
            REQUIRE(std::equal(truth.begin(), truth.end(), y.begin() + i * w.rows));
          }
          // The last group may hold one or two k, which round.
          for (float v : y) REQUIRE(std::fabs(v - whole) <= 381.0 / 127 + std::fabs(whole) * 1e-6);
        }
      }
    }
  }
}

TEST_CASE("a row of lookups does not depend on the others, nor on how panels are handed out") {
  constexpr int64_t kN = 500, kK = 1280, kM = 19, kLdy = 510;
  const PackedMat w = pack(ternary(kN, kK, 41).raw(), 1.0f, PanelKind::kL3);
  const std::vector<float> x = normal_rows(kM * kK, 42);
  for (std::string_view isa : isas_with_lookups()) {
    const std::vector<float> whole = product(kernels(isa), w, x, kM);
    for (int64_t i = 0; i < kM; ++i) {
      const std::vector<float> one = product(kernels(isa), w, std::span(x).subspan(i * kK, kK), 1);
      REQUIRE(std::equal(one.begin(), one.end(), whole.begin() + i * kN));
    }
    const QuantRows rows = quantized(kernels(isa), x, kM, kK);
    constexpr float kUntouched = 12345.0f;
    std::vector<float> y(kM * kLdy, kUntouched);
    for (int64_t p : {6, 0, 5, 1}) matmul(kernels(isa), w, rows, p, p + 1, y, kLdy);
    matmul(kernels(isa), w, rows, 2, 4, y, kLdy);
    for (int64_t i = 0; i < kM; ++i) {
      for (int64_t n = 0; n < kLdy; ++n) {
        const bool written = n < kN && n / kPanelRows != 4 && n / kPanelRows != 7;
        REQUIRE(y[i * kLdy + n] == (written ? whole[i * kN + n] : kUntouched));
      }
    }
  }
}

TEST_CASE("a row of zeros gives zeros by lookup") {
  const PackedMat w = pack(ternary(65, 256, 51).raw(), 1.0f, PanelKind::kL3);
  for (std::string_view isa : isas_with_lookups()) {
    CHECK(product(kernels(isa), w, std::vector<float>(3 * 256), 3) ==
          std::vector<float>(3 * 65, 0.0f));
  }
}

TEST_CASE("kernels without lookups refuse the mode, and say what to do") {
  Kernels without = kernels();
  without.lut_tables = nullptr;
  CHECK_THROWS_WITH_AS(ternary_kind(without, true, 1), doctest::Contains("lut \"off\""),
                       std::invalid_argument);
  CHECK(ternary_kind(without, false, 1) == PanelKind::kI2);
}

TEST_CASE("kept panels of more columns than an i32 can sum are refused") {
  const int64_t cols = (int64_t{1} << 18) + 256;
  for (PanelKind kind : {PanelKind::kI2, PanelKind::kL3}) {
    CHECK_THROWS_WITH_AS(packed_from(KeptPanels{kind, 1, cols, 1.0f, {}, {}}),
                         doctest::Contains("i32"), std::invalid_argument);
  }
}

}  // namespace
}  // namespace nearfar::tests
