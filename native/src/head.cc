#include "head.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "half.h"

namespace nearfar {
namespace {

constexpr int64_t kQ4Bytes = 18;  // of a Q4_0 block
constexpr float kLargestHalf = 65504.0f;
constexpr int64_t kMaxColumns = 1 << 18;  // n u of the slack stays below 2^-5
constexpr int64_t kMaxChunks = 64;        // that the rows are shared out in, among threads
constexpr int64_t kAloneBelow = 1 << 14;  // rows of bounds that a second thread does not speed up
constexpr double kTiny = 0x1p-100;
constexpr double kUp = 1.0 + 0x1p-30;  // above the roundings of a sum of 2^18 doubles

// 32 numbers as a Q4_0 block: the one of largest magnitude becomes code 0, weight -8 d. A scale too
// large for 16 bits becomes the largest there is. Returns whether it fitted.
bool quantize_block(const float* x, uint8_t* block) {
  int64_t at = 0;
  for (int64_t i = 1; i < kGroup; ++i) {
    if (std::fabs(x[i]) > std::fabs(x[at])) at = i;
  }
  float d = x[at] / -8.0f;
  const bool fits = std::isfinite(f16_to_f32(f32_to_f16(d)));
  if (!fits) d = std::copysign(kLargestHalf, d);
  float inverse = 1.0f / d;
  if (!std::isfinite(inverse)) inverse = 0.0f;
  const uint16_t half = f32_to_f16(d);
  std::memcpy(block, &half, 2);
  const auto code = [&](int64_t i) {
    return static_cast<uint8_t>(std::clamp(std::trunc(x[i] * inverse + 8.5f), 0.0f, 15.0f));
  };
  for (int64_t i = 0; i < kGroup / 2; ++i) {
    block[2 + i] = static_cast<uint8_t>(code(i) | code(i + kGroup / 2) << 4);
  }
  return fits;
}

double squared(double x) { return x * x; }

float rounded_up(double x) { return std::nextafter(static_cast<float>(x), HUGE_VALF); }

// kQ4 panels of w, 64 rows at a time; for each row see(row, its numbers, those of the copy).
template <typename See>
PackedMat to_q4(const RawTensor& w, float scale, ThreadPool& pool, bool must_fit, const See& see) {
  require_whole(w);
  if (w.cols % kGroup != 0) {
    throw std::invalid_argument("4.5 bits: expected rows of a multiple of 32 numbers, found " +
                                std::to_string(w.cols));
  }
  const int64_t row_size = w.cols / kGroup * kQ4Bytes;
  PackedMat all;
  all.kind = PanelKind::kQ4;
  all.rows = w.rows;
  all.cols = w.cols;
  all.scale = scale;
  all.panel_bytes = form(PanelKind::kQ4).head * (w.cols / kGroup) + w.cols / 8 * 256;
  all.data = AlignedBuffer(static_cast<size_t>(all.n_panels() * all.panel_bytes));
  pool.run(all.n_panels(), [&](int64_t p, int) {
    const int64_t first = p * kPanelRows, n = std::min(kPanelRows, w.rows - first);
    std::vector<float> x(static_cast<size_t>(w.cols)), copied(x.size());
    std::vector<uint8_t> bytes(static_cast<size_t>(n * row_size));
    const RawTensor q4{TensorType::kQ4_0, n, w.cols, bytes};
    for (int64_t i = 0; i < n; ++i) {
      dequantize_row(w, first + i, x);
      bool fits = true, finite = true;
      for (const float v : x) finite &= std::isfinite(v);
      if (!finite) {
        throw std::invalid_argument("row " + std::to_string(first + i) +
                                    " holds a number that is not finite");
      }
      for (int64_t j = 0; j < w.cols / kGroup; ++j) {
        fits &= quantize_block(&x[j * kGroup], &bytes[i * row_size + j * kQ4Bytes]);
      }
      if (!fits && must_fit) {
        throw std::invalid_argument("row " + std::to_string(first + i) +
                                    " holds numbers too large for the 16-bit scales of 4.5 bits");
      }
      dequantize_row(q4, i, copied);
      see(first + i, x, copied);
    }
    const PackedMat panel = pack(q4);
    std::memcpy(all.data.data() + p * all.panel_bytes, panel.data.data(), panel.data.size());
  });
  return all;
}

}  // namespace

HeadMode head_mode(std::string_view name) {
  if (name == "file") return HeadMode::kFile;
  if (name == "q4") return HeadMode::kQ4;
  if (name == "screened") return HeadMode::kScreened;
  throw std::invalid_argument("head \"" + std::string(name) + "\": expected file, q4 or screened");
}

PackedMat requantized(const RawTensor& w, float scale, ThreadPool& pool) {
  return to_q4(w, scale, pool, true, [](int64_t, const auto&, const auto&) {});
}

bool can_be_screened(const PackedMat& head) {
  const int64_t copy_bytes = head.cols / kGroup * (128 + 1024);
  return head.scale == 1.0f && head.cols % kGroup == 0 && head.cols <= kMaxColumns &&
         !form(head.kind).has_min && head.panel_bytes * 3 >= copy_bytes * 4;
}

PackedMat screen_copy(const RawTensor& w, ThreadPool& pool, ScreenBounds& bounds) {
  bounds.cols = w.cols;
  bounds.residual.resize(static_cast<size_t>(w.rows));
  bounds.size.resize(static_cast<size_t>(w.rows));
  return to_q4(w, 1.0f, pool, false, [&](int64_t row, const auto& x, const auto& copied) {
    double difference = 0, size = 0;
    for (size_t k = 0; k < x.size(); ++k) {
      difference += squared(static_cast<double>(copied[k]) - x[k]);
      size += squared(copied[k]);
    }
    bounds.residual[row] = rounded_up(std::sqrt(difference) * kUp);
    bounds.size[row] = rounded_up(std::sqrt(size) * kUp);
  });
}

InputNorms input_norms(const Rows& head, const Rows& copy, int64_t row) {
  const auto value = [row](const Rows& r, int64_t k) -> double {
    if (r.grain == kGrainFloat) return r.x[row * r.x_stride + k];
    const int64_t group = r.grain > 0 ? k / r.grain : 0;
    return static_cast<double>(r.scales[row * r.n_scales + group]) * r.q[row * r.q_stride + k];
  };
  InputNorms n{0, 0, 0};
  for (int64_t k = 0; k < head.cols; ++k) {
    const double a = value(head, k), b = value(copy, k);
    n.head += squared(a);
    n.copy += squared(b);
    n.difference += squared(b - a);
  }
  return {std::sqrt(n.head) * kUp, std::sqrt(n.copy) * kUp, std::sqrt(n.difference) * kUp};
}

int64_t mark_candidates(const ScreenBounds& bounds, std::span<const float> scores,
                        const InputNorms& norms, ThreadPool& pool, std::span<uint8_t> marks) {
  // e_v = of_residual |C_v - W_v| + of_size |C_v| + tiny, with |W_v| <= |C_v| + |C_v - W_v|.
  const double nu = static_cast<double>(bounds.cols + 16) * 0x1p-24, g = nu / (1 - nu);
  const double of_residual = (1 + g) * norms.head * kUp;
  const double of_size = (norms.difference + g * (norms.copy + norms.head)) * kUp;
  const auto error = [&](int64_t v) {
    return of_residual * bounds.residual[v] + of_size * bounds.size[v] + kTiny;
  };
  const auto rows = static_cast<int64_t>(bounds.residual.size());
  const auto n_panels = static_cast<int64_t>(marks.size());
  const int64_t chunk_rows = (n_panels + kMaxChunks - 1) / kMaxChunks * kPanelRows;
  const int64_t n_chunks = (rows + chunk_rows - 1) / chunk_rows;
  const bool alone = rows < kAloneBelow;
  const auto all = [&] {
    std::fill(marks.begin(), marks.end(), uint8_t{1});
    return static_cast<int64_t>(marks.size());
  };
  if (!std::isfinite(of_residual) || !std::isfinite(of_size)) return all();

  std::array<double, kMaxChunks> least;
  std::array<int64_t, kMaxChunks> found = {};
  pool.run(
      n_chunks,
      [&](int64_t chunk, int) {
        double best = -std::numeric_limits<double>::infinity();
        bool finite = true;
        for (int64_t v = chunk * chunk_rows; v < std::min(rows, (chunk + 1) * chunk_rows); ++v) {
          const double lower = scores[v] - error(v);
          finite &= std::isfinite(lower);
          best = std::max(best, lower);
        }
        least[chunk] = finite ? best : std::numeric_limits<double>::quiet_NaN();
      },
      alone);
  double best = least[0];
  for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
    if (std::isnan(least[chunk])) return all();
    best = std::max(best, least[chunk]);
  }
  pool.run(
      n_chunks,
      [&](int64_t chunk, int) {
        const int64_t end = std::min(rows, (chunk + 1) * chunk_rows);
        for (int64_t v = chunk * chunk_rows; v < end; v += kPanelRows) {
          bool may = false;
          for (int64_t i = v; i < std::min(end, v + kPanelRows); ++i) {
            may |= scores[i] + error(i) >= best;
          }
          marks[v / kPanelRows] = may;
          found[chunk] += may;
        }
      },
      alone);
  int64_t n = 0;
  for (const int64_t f : found) n += f;
  return n;
}

}  // namespace nearfar
