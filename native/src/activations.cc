#include "activations.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>

#include "check.h"
#include "half.h"

namespace nearfar {
namespace {

constexpr int64_t kSumRow = 256, kSum32 = 32, kSum256 = 16;  // values per sum, by grain

bool is_float(int grain) { return grain == kGrainFloat || grain == kGrainBF16; }

bool one_scale(int grain) { return grain == kGrainRow || grain == kGrainTables; }

int64_t values_per_sum(int grain) {
  return one_scale(grain) ? kSumRow : grain == 32 ? kSum32 : kSum256;
}

constexpr int64_t kReadBeyond = 16;  // q behind a row that kernels read: kT5 steps are of 20 k

int64_t pad(int64_t n) { return (n + 63) / 64 * 64; }

// A group whose largest magnitude is below this counts as zeros: 127 / max stays finite.
constexpr float kSmallestMax = 0x1p-120f;

// q[n] from x[n]; returns the scale.
float quantize_group(const float* x, int64_t n, const Ops& ops, int8_t* q) {
  const uint32_t bits = ops.max_magnitude(x, n);
  if (bits >= 0x7f800000u) throw std::invalid_argument("an activation is not finite");
  const float max = std::bit_cast<float>(bits);
  if (max < kSmallestMax) {
    std::memset(q, 0, static_cast<size_t>(n));
    return 0.0f;
  }
  ops.to_int8(x, n, 127.0f / max, q);
  return max / 127.0f;
}

}  // namespace

void QuantRows::reset(int64_t m, int64_t cols, int grain) {
  if (!is_float(grain) && !one_scale(grain) && grain != 32 && grain != 256) {
    throw std::invalid_argument("activation grain " + std::to_string(grain) +
                                ": expected -3, -2, -1, 0, 32 or 256");
  }
  const int64_t step = is_float(grain) || grain == kGrainRow ? 1 : one_scale(grain) ? 256 : grain;
  if (m < 0 || cols <= 0 || cols % step != 0) {
    throw std::invalid_argument("activations [" + std::to_string(m) + ", " + std::to_string(cols) +
                                "]: expected a multiple of " + std::to_string(step) + " columns");
  }
  rows_ = Rows{};
  rows_.m = m;
  rows_.cols = cols;
  rows_.grain = grain;
  if (grain == kGrainFloat) {
    rows_.x_stride = pad(cols);
    const auto bytes = static_cast<size_t>(m * rows_.x_stride) * sizeof(float);
    if (x_.size() < bytes) x_ = AlignedBuffer(bytes);
    return;
  }
  if (grain == kGrainBF16) {
    // An odd number of cache lines: rows at a distance of 4 KiB would share one set of L1.
    rows_.bf16_stride = pad(cols) + 32;
    const auto bytes = static_cast<size_t>(m * rows_.bf16_stride) * sizeof(uint16_t);
    if (x_.size() < bytes) x_ = AlignedBuffer(bytes);
    return;
  }
  rows_.q_stride = pad(cols + kReadBeyond);
  rows_.n_scales = one_scale(grain) ? 1 : cols / grain;
  rows_.n_sums = (cols + values_per_sum(grain) - 1) / values_per_sum(grain);
  const auto bytes = static_cast<size_t>(m * rows_.q_stride);
  if (q_.size() < bytes) q_ = AlignedBuffer(bytes);
  const auto n_scales = static_cast<size_t>(m * rows_.n_scales);
  const auto n_sums = static_cast<size_t>(m * rows_.n_sums);
  if (scales_.size() < n_scales) scales_.resize(n_scales);
  if (sums_.size() < n_sums) sums_.resize(n_sums);
  if (grain != kGrainTables) return;
  rows_.tables_stride = lut_units(cols) * kLutUnitTables;
  const auto n_tables = static_cast<size_t>(m * rows_.tables_stride);
  if (tables_.size() < n_tables) tables_ = AlignedBuffer(n_tables);
  if (table_scales_.size() < static_cast<size_t>(m)) table_scales_.resize(m);
}

Rows QuantRows::view() const {
  Rows r = rows_;
  r.x = reinterpret_cast<const float*>(x_.data());
  r.q = reinterpret_cast<const int8_t*>(q_.data());
  r.scales = scales_.data();
  r.sums = sums_.data();
  r.tables = tables_.data();
  r.table_scales = table_scales_.data();
  r.bf16 = reinterpret_cast<const uint16_t*>(x_.data());
  return r;
}

void QuantRows::quantize_row(std::span<const float> x, int64_t i, const Ops& ops,
                             LutTables* lut_tables) {
  if (i < 0 || i >= rows_.m || static_cast<int64_t>(x.size()) != rows_.cols) {
    throw std::invalid_argument("activation row " + std::to_string(i) + " of " +
                                std::to_string(x.size()) + " values: expected one of " +
                                std::to_string(rows_.m) + " rows of " + std::to_string(rows_.cols));
  }
  if (rows_.grain == kGrainFloat) {
    auto* out = reinterpret_cast<float*>(x_.data()) + i * rows_.x_stride;
    std::copy(x.begin(), x.end(), out);
    return;
  }
  if (rows_.grain == kGrainBF16) {
    auto* out = reinterpret_cast<uint16_t*>(x_.data()) + i * rows_.bf16_stride;
    ops.to_bf16(x.data(), rows_.cols, out);
    std::memset(out + rows_.cols, 0, (rows_.bf16_stride - rows_.cols) * sizeof(uint16_t));
    return;
  }
  auto* q = reinterpret_cast<int8_t*>(q_.data()) + i * rows_.q_stride;
  std::memset(q + rows_.cols, 0, rows_.q_stride - rows_.cols);
  const int64_t group = one_scale(rows_.grain) ? rows_.cols : rows_.grain;
  for (int64_t g = 0; g < rows_.n_scales; ++g) {
    float scale = quantize_group(x.data() + g * group, group, ops, q + g * group);
    if (rows_.grain == 32 && scale < 65504.0f) scale = f16_to_f32(f32_to_f16(scale));
    scales_[i * rows_.n_scales + g] = scale;
  }
  ops.sum_runs(q, rows_.cols, values_per_sum(rows_.grain), &sums_[i * rows_.n_sums]);
  if (rows_.grain != kGrainTables) return;
  const float step = lut_tables(q, rows_.cols, tables_.data() + i * rows_.tables_stride);
  table_scales_[i] = scales_[i] * step;
}

Rows some_rows(const Rows& x, int64_t first, int64_t m) {
  Rows r = x;
  r.m = m;
  if (x.x != nullptr) r.x += first * x.x_stride;
  if (x.bf16 != nullptr) r.bf16 += first * x.bf16_stride;
  if (x.q != nullptr) {
    r.q += first * x.q_stride;
    r.scales += first * x.n_scales;
    r.sums += first * x.n_sums;
  }
  if (x.tables != nullptr) {
    r.tables += first * x.tables_stride;
    r.table_scales += first;
  }
  return r;
}

void quantize_rows(std::span<const float> x, int64_t m, int64_t cols, int grain, QuantRows& out) {
  out.reset(m, cols, grain);
  if (static_cast<int64_t>(x.size()) != m * cols) {
    throw std::invalid_argument("activations hold " + std::to_string(x.size()) +
                                " values: expected [" + std::to_string(m) + ", " +
                                std::to_string(cols) + "]");
  }
  for (int64_t i = 0; i < m; ++i) out.quantize_row(x.subspan(i * cols, cols), i);
}

}  // namespace nearfar
