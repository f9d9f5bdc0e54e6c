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

constexpr float kLargestHalf = 65504.0f;
constexpr int64_t kMaxColumns = 1 << 18;  // n u of the slack stays below 2^-5
constexpr int64_t kMaxChunks = 64;        // that the rows are shared out in, among threads
constexpr int64_t kAloneBelow = 1 << 14;  // rows of bounds that a second thread does not speed up
constexpr double kTiny = 0x1p-100;
constexpr double kUp = 1.0 + 0x1p-30;  // above the roundings of a sum of 2^18 doubles

// 32 numbers as a Q4_0 block: the one of largest magnitude becomes code 0, weight -8 d. A scale too
// large for 16 bits becomes the largest there is. Returns whether it fitted.
bool round_q4_0(const float* x, uint8_t* block) {
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

// The same as a Q8_0 block: the largest magnitude becomes 127 d.
bool round_q8_0(const float* x, uint8_t* block) {
  float most = 0;
  for (int64_t i = 0; i < kGroup; ++i) most = std::max(most, std::fabs(x[i]));
  float d = most / 127.0f;
  const bool fits = std::isfinite(f16_to_f32(f32_to_f16(d)));
  if (!fits) d = kLargestHalf;
  float inverse = 1.0f / d;
  if (!std::isfinite(inverse)) inverse = 0.0f;
  const uint16_t half = f32_to_f16(d);
  std::memcpy(block, &half, 2);
  for (int64_t i = 0; i < kGroup; ++i) {
    const auto code = static_cast<int8_t>(std::clamp(std::round(x[i] * inverse), -127.0f, 127.0f));
    block[2 + i] = static_cast<uint8_t>(code);
  }
  return fits;
}

struct Rounding {
  TensorType type;
  PanelKind kind;
  bool (*round)(const float* x, uint8_t* block);

  int64_t block_bytes() const { return block_shape(type).bytes; }
  int64_t panel_bytes(int64_t cols) const {
    return cols / kGroup * (form(kind).head + kGroup * kPanelRows * form(kind).low / 8);
  }
};
constexpr Rounding kFourBits{TensorType::kQ4_0, PanelKind::kQ4, round_q4_0};
constexpr Rounding kEightBits{TensorType::kQ8_0, PanelKind::kInt8, round_q8_0};

const Rounding& rounding_of_copy(const PackedMat& head) {
  return form(head.kind).scheme == Scheme::kFloat ? kEightBits : kFourBits;
}

double squared(double x) { return x * x; }

float rounded_up(double x) { return std::nextafter(static_cast<float>(x), HUGE_VALF); }

// Panels of w, rounded, 64 rows at a time; for each row see(row, its numbers, those of the copy).
template <typename See>
PackedMat rounded(const RawTensor& w, const Rounding& to, ThreadPool& pool, bool must_fit,
                  const See& see) {
  require_whole(w);
  if (w.cols % kGroup != 0) {
    throw std::invalid_argument("4.5 bits: expected rows of a multiple of 32 numbers, found " +
                                std::to_string(w.cols));
  }
  const int64_t block_bytes = to.block_bytes(), row_size = w.cols / kGroup * block_bytes;
  PackedMat all;
  all.kind = to.kind;
  all.rows = w.rows;
  all.cols = w.cols;
  all.panel_bytes = to.panel_bytes(w.cols);
  all.data = AlignedBuffer(static_cast<size_t>(all.n_panels() * all.panel_bytes));
  pool.run(all.n_panels(), [&](int64_t p, int) {
    const int64_t first = p * kPanelRows, n = std::min(kPanelRows, w.rows - first);
    std::vector<float> x(static_cast<size_t>(w.cols)), copied(x.size());
    std::vector<uint8_t> bytes(static_cast<size_t>(n * row_size));
    const RawTensor copy{to.type, n, w.cols, bytes};
    for (int64_t i = 0; i < n; ++i) {
      dequantize_row(w, first + i, x);
      bool fits = true, finite = true;
      for (const float v : x) finite &= std::isfinite(v);
      if (!finite) {
        throw std::invalid_argument("row " + std::to_string(first + i) +
                                    " holds a number that is not finite");
      }
      for (int64_t j = 0; j < w.cols / kGroup; ++j) {
        fits &= to.round(&x[j * kGroup], &bytes[i * row_size + j * block_bytes]);
      }
      if (!fits && must_fit) {
        throw std::invalid_argument("row " + std::to_string(first + i) +
                                    " holds numbers too large for the 16-bit scales of 4.5 bits");
      }
      dequantize_row(copy, i, copied);
      see(first + i, x, copied);
    }
    const PackedMat panel = pack(copy);
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
  PackedMat m = rounded(w, kFourBits, pool, true, [](int64_t, const auto&, const auto&) {});
  m.scale = scale;
  return m;
}

// The head multiplies other numbers than the file's, or adds in another order than the bounds say.
bool is_rounded(PanelKind kind) { return kind == PanelKind::kBF16Dot || kind == PanelKind::kW8; }

bool can_be_screened(const PackedMat& head) {
  return !is_rounded(head.kind) && head.scale == 1.0f && head.cols % kGroup == 0 &&
         head.cols <= kMaxColumns && !form(head.kind).has_min &&
         head.panel_bytes * 3 >= rounding_of_copy(head).panel_bytes(head.cols) * 4;
}

PackedMat screen_copy(const RawTensor& w, const PackedMat& head, ThreadPool& pool,
                      ScreenBounds& bounds) {
  bounds.cols = w.cols;
  bounds.residual.resize(static_cast<size_t>(w.rows));
  bounds.size.resize(static_cast<size_t>(w.rows));
  const auto see = [&](int64_t row, const auto& x, const auto& copied) {
    double difference = 0, size = 0;
    for (size_t k = 0; k < x.size(); ++k) {
      difference += squared(static_cast<double>(copied[k]) - x[k]);
      size += squared(copied[k]);
    }
    bounds.residual[row] = rounded_up(std::sqrt(difference) * kUp);
    bounds.size[row] = rounded_up(std::sqrt(size) * kUp);
  };
  return rounded(w, rounding_of_copy(head), pool, false, see);
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
