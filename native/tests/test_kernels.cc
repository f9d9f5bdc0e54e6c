// Every kernel gives the bits of `ref`; `ref` gives the sums that the file's numbers say.
#include <doctest/doctest.h>

#include <cmath>
#include <cstdlib>

#include "kernels.h"
#include "made_tensor.h"

namespace nearfar::tests {
namespace {

// An f32 chain of n terms is off by at most n roundings of the sum of magnitudes; the group scales
// of the integer kinds round their products a few times more.
constexpr double kMaxF32Chain = 0x1p-24;

std::vector<float> random_rows(int64_t n, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& v : x) v = normal(rng);
  return x;
}

std::vector<float> product(const Kernels& k, const PackedMat& w, std::span<const float> x,
                           int64_t m) {
  QuantRows rows;
  quantize_rows(x, m, w.cols, w.grain(), rows);
  std::vector<float> y(m * w.rows, -1.0f);
  matmul(k, w, rows, y);
  return y;
}

// What the int8 kernels see of x: q * s.
std::vector<float> rounded(const QuantRows& x) {
  const Rows r = x.view();
  std::vector<float> out(r.m * r.cols);
  for (int64_t i = 0; i < r.m; ++i) {
    for (int64_t k = 0; k < r.cols; ++k) {
      if (r.grain == kGrainFloat) {
        out[i * r.cols + k] = r.x[i * r.x_stride + k];
      } else {
        const float s = r.scales[i * r.n_scales + k / (r.cols / r.n_scales)];
        out[i * r.cols + k] = s * static_cast<float>(r.q[i * r.q_stride + k]);
      }
    }
  }
  return out;
}

// The panel kinds that a ternary type may take; the others have one each.
struct Ternary {
  bool one_scale_a_row;
  PanelKind ternary;
};
std::vector<Ternary> ternary_kinds(TensorType type) {
  if (type == TensorType::kTQ1_0)
    return {{true, PanelKind::kT5}, {true, PanelKind::kI2}, {false, PanelKind::kI2}};
  if (type == TensorType::kTQ2_0) return {{true, PanelKind::kI2}, {false, PanelKind::kI2}};
  return {{true, PanelKind::kI2}};
}

TEST_CASE("the scalar kernels multiply what the file holds") {
  for (TensorType type : kTypes) {
    for (Ternary how : ternary_kinds(type)) {
      const MadeTensor t = make_tensor(type, 70, columns(type).back(), 3, how.one_scale_a_row);
      const PackedMat w = pack(t.raw(), 0.75f, how.ternary);
      constexpr int64_t kM = 2;
      QuantRows x;
      quantize_rows(random_rows(kM * t.cols, 4), kM, t.cols, w.grain(), x);
      const std::vector<float> seen = rounded(x);
      std::vector<float> y(kM * t.rows), row(t.cols);
      matmul(kernels("ref"), w, x, y);
      for (int64_t n = 0; n < t.rows; ++n) {
        dequantize_row(t.raw(), n, row);
        for (int64_t i = 0; i < kM; ++i) {
          double sum = 0, magnitude = 0;
          for (int64_t k = 0; k < t.cols; ++k) {
            const double term = double{row[k]} * seen[i * t.cols + k];
            sum += term;
            magnitude += std::fabs(term);
          }
          const double bound = static_cast<double>(t.cols + 8) * kMaxF32Chain * magnitude;
          REQUIRE_MESSAGE(std::fabs(y[i * t.rows + n] - 0.75 * sum) <= bound, t.name());
        }
      }
    }
  }
}

TEST_CASE("every ISA gives the bits of ref, for every type, shape and number of rows") {
  for (std::string_view isa : isas_available()) {
    if (isa == "ref") continue;
    for (TensorType type : kTypes) {
      for (int64_t n : {1, 3, 17, 63, 64, 65, 130}) {
        for (int64_t k : columns(type)) {
          for (Ternary how : ternary_kinds(type)) {
            const MadeTensor t = make_tensor(type, n, k, 11, how.one_scale_a_row);
            const PackedMat w = pack(t.raw(), 1.25f, how.ternary);
            const std::vector<float> x = random_rows(9 * k, 12);
            const std::vector<float> truth = product(kernels("ref"), w, x, 9);
            for (int64_t m = 1; m <= 9; ++m) {
              const std::vector<float> y = product(kernels(isa), w, std::span(x).first(m * k), m);
              const bool same = std::equal(y.begin(), y.end(), truth.begin());
              REQUIRE_MESSAGE(same, isa << " " << t.name() << " times " << m << " rows");
            }
          }
        }
      }
    }
  }
}

TEST_CASE("every ISA gives the bits of ref for 1023 rows") {
  constexpr int64_t kN = 1023;
  for (TensorType type : kTypes) {
    const int64_t k = columns(type)[0];
    for (Ternary how : ternary_kinds(type)) {
      const MadeTensor t = make_tensor(type, kN, k, 15, how.one_scale_a_row);
      const PackedMat w = pack(t.raw(), 1.0f, how.ternary);
      const std::vector<float> x = random_rows(3 * k, 16);
      const std::vector<float> truth = product(kernels("ref"), w, x, 3);
      for (std::string_view isa : isas_available()) {
        REQUIRE_MESSAGE(product(kernels(isa), w, x, 3) == truth, isa << " " << t.name());
        const std::vector<float> one = product(kernels(isa), w, std::span(x).first(k), 1);
        REQUIRE_MESSAGE(std::equal(one.begin(), one.end(), truth.begin()), isa << " " << t.name());
      }
    }
  }
}

TEST_CASE("a row's bits do not depend on the other rows, nor on how panels are handed out") {
  for (std::string_view isa : isas_available()) {
    for (TensorType type : kTypes) {
      const int64_t k = columns(type).back(), n = 200, m = 9;
      const PackedMat w = pack(make_tensor(type, n, k, 21).raw(), 1.0f, PanelKind::kT5);
      const std::vector<float> x = random_rows(m * k, 22);
      const std::vector<float> whole = product(kernels(isa), w, x, m);
      for (int64_t i = 0; i < m; ++i) {
        const std::vector<float> one = product(kernels(isa), w, std::span(x).subspan(i * k, k), 1);
        REQUIRE(std::equal(one.begin(), one.end(), whole.begin() + i * n));
      }
      QuantRows rows;
      quantize_rows(x, m, k, w.grain(), rows);
      std::vector<float> split(m * n);
      for (int64_t p : {3, 0, 2, 1}) matmul(kernels(isa), w, rows, p, p + 1, split, n);
      REQUIRE(split == whole);
    }
  }
}

// 128 rows share what a kernel unpacks, and a prompt seldom ends there.
TEST_CASE("rows beyond the first 128 have the bits that they have alone") {
  for (std::string_view isa : isas_available()) {
    if (isa == "ref") continue;  // one product at a time
    for (TensorType type : kTypes) {
      const int64_t k = columns(type)[1], n = 65;
      const PackedMat w = pack(make_tensor(type, n, k, 23).raw(), 1.0f, PanelKind::kT5);
      const std::vector<float> x = random_rows(135 * k, 24);
      for (int64_t m : {129, 135}) {
        const std::vector<float> whole = product(kernels(isa), w, std::span(x).first(m * k), m);
        for (int64_t i : {int64_t{0}, int64_t{127}, int64_t{128}, m - 1}) {
          const std::vector<float> one =
              product(kernels(isa), w, std::span(x).subspan(i * k, k), 1);
          REQUIRE(std::equal(one.begin(), one.end(), whole.begin() + i * n));
        }
      }
    }
  }
}

TEST_CASE("a kernel writes its panels' rows and nothing else") {
  for (std::string_view isa : isas_available()) {
    for (TensorType type : kTypes) {
      const int64_t k = columns(type)[0], n = 150, m = 3, ldy = 170;
      const PackedMat w = pack(make_tensor(type, n, k, 31).raw());
      QuantRows rows;
      quantize_rows(random_rows(m * k, 32), m, k, w.grain(), rows);
      constexpr float kUntouched = 12345.0f;
      std::vector<float> y(m * ldy, kUntouched);
      matmul(kernels(isa), w, rows, 1, 3, y, ldy);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < ldy; ++j) {
          REQUIRE((y[i * ldy + j] != kUntouched) == (j >= 64 && j < n));
        }
      }
    }
  }
}

// All codes of `type` equal to `code`, scales 1 (Q4_K and Q6_K: their integer scales at `scale`,
// min at 63).
MadeTensor constant_tensor(TensorType type, int64_t n, int64_t k, int code, int scale) {
  MadeTensor t = make_tensor(type, n, k, 1);
  const auto bits = [code](int shift, int mask) { return (code >> shift & mask) * (0xff / mask); };
  const auto size = static_cast<size_t>(block_shape(type).bytes);
  for (size_t i = 0; i < t.bytes.size(); i += size) {
    uint8_t* b = &t.bytes[i];
    switch (type) {
      case TensorType::kTQ2_0:
        std::memset(b, code * 0x55, 64);
        break;
      case TensorType::kQ4_0:
        std::memset(b + 2, code * 0x11, 16);
        break;
      case TensorType::kQ8_0:
        std::memset(b + 2, code, 32);
        break;
      case TensorType::kQ4_1:
        std::memset(b + 4, code * 0x11, 16);
        break;
      case TensorType::kQ2_K:
        std::memset(b, 0xf0 | scale, 16);
        std::memset(b + 16, bits(0, 3), 64);
        break;
      case TensorType::kQ3_K:
        std::memset(b, bits(2, 1), 32);
        std::memset(b + 32, bits(0, 3), 64);
        std::memset(b + 96, ((scale + 32) & 15) * 0x11, 8);
        std::memset(b + 104, (scale + 32) / 16 * 0x55, 4);
        break;
      case TensorType::kQ5_K:
      case TensorType::kQ4_K:
        std::memset(b + 4, scale == 63 ? 0xff : scale, 4);  // 63 with its top bits, or below 16
        std::memset(b + 8, 0xff, 4);
        std::memset(b + 12, scale == 63 ? 0xff : 0xf0 | scale, 4);
        std::memset(b + 16, bits(4, 1), 32);
        std::memset(b + size - 128, bits(0, 15), 128);
        break;
      case TensorType::kQ6_K:
        std::memset(b, (code & 15) * 0x11, 128);
        std::memset(b + 128, (code >> 4) * 0x55, 64);
        std::memset(b + 192, scale, 16);
        break;
      default:
        FAIL("no such tensor");
    }
  }
  set_scales(t, 1.0f, 1.0f);
  return t;
}

enum class Signs { kPlus, kMinus, kAlternating };

TEST_CASE("sums at the extremes of codes and activations are exact") {
  struct Extreme {
    TensorType type;
    int code, scale;
    double weight;  // what one weight is
  };
  const Extreme extremes[] = {
      {TensorType::kTQ2_0, 0, 0, -1},
      {TensorType::kTQ2_0, 2, 0, 1},
      {TensorType::kTQ2_0, 3, 0, 2},
      {TensorType::kQ4_0, 0, 0, -8},
      {TensorType::kQ4_0, 15, 0, 7},
      {TensorType::kQ4_1, 0, 0, 1},
      {TensorType::kQ4_1, 15, 0, 16},
      {TensorType::kQ2_K, 0, 15, -15},
      {TensorType::kQ2_K, 3, 15, 3 * 15 - 15},
      {TensorType::kQ2_K, 3, 0, -15},
      {TensorType::kQ3_K, 0, 31, -4 * 31},
      {TensorType::kQ3_K, 7, 31, 3 * 31},
      {TensorType::kQ3_K, 0, -32, 4 * 32},
      {TensorType::kQ3_K, 7, -32, -3 * 32},
      {TensorType::kQ5_K, 0, 63, -63},
      {TensorType::kQ5_K, 31, 63, 31 * 63 - 63},
      {TensorType::kQ8_0, -128, 0, -128},
      {TensorType::kQ8_0, 127, 0, 127},
      {TensorType::kQ4_K, 0, 63, -63},
      {TensorType::kQ4_K, 15, 63, 15 * 63 - 63},
      {TensorType::kQ4_K, 15, 0, -63},
      {TensorType::kQ6_K, 0, 127, -32 * 127},
      {TensorType::kQ6_K, 63, 127, 31 * 127},
      {TensorType::kQ6_K, 0, -128, 32 * 128},
      {TensorType::kQ6_K, 63, -128, -31 * 128},
  };
  constexpr int64_t kN = 65;
  for (std::string_view isa : isas_available()) {
    for (const Extreme& e : extremes) {
      for (int64_t k : {int64_t{256}, int64_t{6912}, int64_t{27648}}) {
        if (isa == "ref" && k > 6912) continue;  // the same i32 sums, one product at a time: slow
        const PackedMat w =
            pack(constant_tensor(e.type, kN, k, e.code, e.scale).raw(), 1.0f, PanelKind::kT5);
        for (Signs signs : {Signs::kPlus, Signs::kMinus, Signs::kAlternating}) {
          // max|x| = 127: the scale is 1 and q = x. Rows 0 and 1 are equal: both tile shapes run.
          std::vector<float> x(2 * k);
          for (int64_t i = 0; i < 2 * k; ++i) {
            const bool minus = signs == Signs::kMinus || (signs == Signs::kAlternating && i % 2);
            x[i] = minus ? -127.0f : 127.0f;
          }
          const double terms = signs == Signs::kPlus ? k : signs == Signs::kMinus ? -k : 0;
          const double exact = 127.0 * e.weight * terms;
          // Integer sums are exact; only their conversion and the sum over groups round.
          const double slack = std::fabs(exact) * 0x1p-24 * (1 + static_cast<double>(k) / 32);
          for (const auto& y : {product(kernels(isa), w, x, 2),
                                product(kernels(isa), w, std::span(x).first(k), 1)}) {
            for (float v : y) REQUIRE(std::fabs(v - exact) <= slack);
          }
        }
      }
    }
  }
}

TEST_CASE("sums with every sign matched to its weight are exact") {
  constexpr int64_t kN = 65, kK = 6912;
  for (std::string_view isa : isas_available()) {
    for (TensorType type : std::span(kTypes).subspan(3)) {
      MadeTensor t = make_tensor(type, kN, kK, 41);
      set_scales(t, 1.0f, 1.0f);
      const PackedMat w = pack(t.raw(), 1.0f, PanelKind::kT5);
      std::vector<float> row(kK), x(kK);
      for (int64_t n : {0, 40, 64}) {
        dequantize_row(t.raw(), n, row);
        double exact = 0;
        for (int64_t k = 0; k < kK; ++k) {
          x[k] = row[k] < 0 ? -127.0f : 127.0f;
          exact += double{row[k]} * x[k];
        }
        const float y = product(kernels(isa), w, x, 1)[n];
        REQUIRE(std::fabs(y - exact) <= exact * 0x1p-24 * (1 + kK / 32));
      }
    }
  }
}

// Panels come from files too: what they say may make numbers wrong, and must do nothing else. For
// the sanitizers.
TEST_CASE("no byte of a panel leads a kernel outside of it") {
  std::mt19937 rng(5);
  const auto random_bytes = [&](size_t n) {
    AlignedBuffer bytes(n);
    for (size_t i = 0; i < n; ++i) bytes.data()[i] = static_cast<uint8_t>(rng());
    return bytes;
  };
  for (TensorType type : kTypes) {
    for (PanelKind ternary : {PanelKind::kI2, PanelKind::kT5, PanelKind::kL3}) {
      MadeTensor t = make_tensor(type, 70, columns(type).back(), 3);
      if (block_shape(type).weights == 256) set_scales(t, 0.0f, 0.0f);  // no code 3: kT5 is taken
      const PackedMat like = pack(t.raw(), 1.0f, ternary);
      const AlignedBuffer data = random_bytes(like.data.size());
      const AlignedBuffer scales = random_bytes(like.row_scales.size());
      const PackedMat w = packed_from({like.kind,
                                       t.rows,
                                       t.cols,
                                       1.0f,
                                       {data.data(), data.size()},
                                       {scales.data(), scales.size()}});
      for (auto isa : isas_available()) {
        for (int64_t m : {1, 2, 9}) {
          const Kernels& k = kernels(isa);
          QuantRows x;
          quantize_rows(random_rows(m * t.cols, 4), m, t.cols, w.grain(), x);
          std::vector<float> y(m * w.rows);
          matmul(k, w, x, y);
        }
      }
    }
  }
}

// Floats that were rounded at packing, as `pack` is asked to.
PackedMat rounded_floats(TensorType type, int64_t n, int64_t k, Floats floats) {
  return pack(make_tensor(type, n, k, 61).raw(), 1.25f, PanelKind::kI2, floats);
}

TEST_CASE("8 bits with one scale a row: near the floats, and the bits of ref in every ISA") {
  for (TensorType type : {TensorType::kF32, TensorType::kBF16}) {
    for (int64_t k : {1, 64, 172, 640}) {
      for (int64_t n : {1, 65}) {
        const MadeTensor t = make_tensor(type, n, k, 61);
        const PackedMat w = pack(t.raw(), 1.25f, PanelKind::kI2, Floats::kW8);
        REQUIRE(w.kind == PanelKind::kW8);
        std::vector<float> exact(k), packed(k);
        for (int64_t row = 0; row < n; ++row) {
          dequantize_row(t.raw(), row, exact);
          unpack_row(w, row, packed);
          float most = 0;
          for (float v : exact) most = std::max(most, std::fabs(v));
          for (int64_t i = 0; i < k; ++i) {
            REQUIRE(std::fabs(packed[i] - exact[i]) <= most / 254 * 1.0001f);
          }
        }
        const std::vector<float> x = random_rows(70 * k, 62);
        const std::vector<float> truth = product(kernels("ref"), w, x, 70);
        for (std::string_view isa : isas_available()) {
          for (int64_t m : {1, 2, 7, 8, 17, 33, 70}) {
            const std::vector<float> y = product(kernels(isa), w, std::span(x).first(m * k), m);
            REQUIRE_MESSAGE(std::equal(y.begin(), y.end(), truth.begin()), isa << " " << m);
          }
        }
      }
    }
  }
}

TEST_CASE("8 bits at their extremes are exact") {
  for (int64_t k : {int64_t{64}, int64_t{65536}}) {
    std::vector<float> weights(k), x(40 * k);
    for (int64_t i = 0; i < k; ++i) weights[i] = i % 3 == 0 ? -127.0f : 127.0f;
    for (size_t i = 0; i < x.size(); ++i) x[i] = weights[i % k];
    std::vector<uint8_t> bytes(k * sizeof(float));
    std::memcpy(bytes.data(), weights.data(), bytes.size());
    const RawTensor raw{TensorType::kF32, 1, k, bytes};
    const PackedMat w = pack(raw, 1.0f, PanelKind::kI2, Floats::kW8);
    for (std::string_view isa : isas_available()) {
      for (int64_t m : {1, 40}) {
        for (float y : product(kernels(isa), w, std::span(x).first(m * k), m)) {
          REQUIRE(y == 127.0f * 127.0f * static_cast<float>(k));
        }
      }
    }
  }
  std::vector<uint8_t> bytes;
  bytes.resize(64 * sizeof(float));
  const float infinite = INFINITY;
  std::memcpy(bytes.data(), &infinite, sizeof(float));
  CHECK_THROWS_AS(pack({TensorType::kF32, 1, 64, bytes}, 1, PanelKind::kI2, Floats::kW8),
                  std::invalid_argument);
}

TEST_CASE("bf16 times bf16: near the sums of what both were rounded to, and a row's bits its own") {
  for (TensorType type : {TensorType::kF32, TensorType::kF16}) {
    for (int64_t k : {1, 31, 200, 640}) {
      for (int64_t n : {1, 65}) {
        const PackedMat w = rounded_floats(type, n, k, Floats::kBF16);
        REQUIRE(w.kind == PanelKind::kBF16Dot);
        const std::vector<float> x = random_rows(70 * k, 63);
        std::vector<float> row(k);
        for (std::string_view isa : isas_available()) {
          const std::vector<float> whole = product(kernels(isa), w, x, 70);
          for (int64_t j = 0; j < n; j += 17) {
            unpack_row(w, j, row);
            double sum = 0, magnitude = 0;
            for (int64_t i = 0; i < k; ++i) {
              const double term = double{row[i]} * bf16_to_f32(f32_to_bf16(x[69 * k + i]));
              sum += term;
              magnitude += std::fabs(term);
            }
            const double bound = static_cast<double>(k + 8) * kMaxF32Chain * magnitude * 1.25;
            REQUIRE(std::fabs(whole[69 * n + j] - 1.25 * sum) <= bound);
          }
          for (int64_t m : {1, 2, 6, 17, 33}) {
            for (int64_t first : {int64_t{0}, 70 - m}) {
              const auto y = product(kernels(isa), w, std::span(x).subspan(first * k, m * k), m);
              REQUIRE(std::equal(y.begin(), y.end(), whole.begin() + first * n));
            }
          }
        }
      }
    }
  }
}

TEST_CASE("rows of zeros give zeros") {
  for (std::string_view isa : isas_available()) {
    for (TensorType type : kTypes) {
      const int64_t k = columns(type)[1];
      const PackedMat w = pack(make_tensor(type, 65, k, 51, false).raw());
      const std::vector<float> y = product(kernels(isa), w, std::vector<float>(5 * k), 5);
      REQUIRE(y == std::vector<float>(5 * 65, 0.0f));
    }
  }
}

TEST_CASE("no rows and no panels are no work") {
  const PackedMat w = pack(make_tensor(TensorType::kQ8_0, 65, 64, 1).raw());
  QuantRows rows;
  quantize_rows({}, 0, 64, 32, rows);
  std::vector<float> y;
  CHECK_NOTHROW(matmul(kernels(), w, rows, y));
  quantize_rows(random_rows(64, 1), 1, 64, 32, rows);
  CHECK_NOTHROW(matmul(kernels(), w, rows, 1, 1, y, 65));
}

TEST_CASE("shapes that do not fit are refused at the door") {
  const PackedMat w = pack(make_tensor(TensorType::kQ8_0, 65, 64, 1).raw());
  QuantRows rows;
  std::vector<float> y(2 * 65);
  const std::vector<float> x = random_rows(2 * 96, 1);
  quantize_rows(x, 2, 96, 32, rows);
  CHECK_THROWS_AS(matmul(kernels(), w, rows, y), std::invalid_argument);  // columns
  quantize_rows(std::span(x).first(128), 2, 64, kGrainFloat, rows);
  CHECK_THROWS_AS(matmul(kernels(), w, rows, y), std::invalid_argument);  // grain
  quantize_rows(std::span(x).first(128), 2, 64, 32, rows);
  CHECK_NOTHROW(matmul(kernels(), w, rows, y));
  CHECK_THROWS_AS(matmul(kernels(), w, rows, 0, 3, y, 65), std::invalid_argument);
  CHECK_THROWS_AS(matmul(kernels(), w, rows, -1, 1, y, 65), std::invalid_argument);
  CHECK_THROWS_AS(matmul(kernels(), w, rows, 2, 1, y, 65), std::invalid_argument);
  CHECK_THROWS_AS(matmul(kernels(), w, rows, 0, 2, y, 64), std::invalid_argument);
  y.pop_back();
  CHECK_THROWS_AS(matmul(kernels(), w, rows, y), std::invalid_argument);
}

TEST_CASE("an ISA is chosen by its name, and an unknown one is refused") {
  const std::vector<std::string_view> names = isas_available();
  REQUIRE(names.front() == "ref");
  std::string joined;
  for (std::string_view name : names) joined += (joined.empty() ? "" : ", ") + std::string(name);
  MESSAGE("kernels here: " << joined);  // tests/native/test_emulation.py reads this
  for (std::string_view name : names) CHECK(kernels(name).isa == name);
  CHECK(kernels().isa == names.back());
  CHECK_THROWS_AS(kernels("sse9"), std::invalid_argument);
  CHECK_THROWS_AS(kernels("AVX2"), std::invalid_argument);
}

}  // namespace
}  // namespace nearfar::tests
