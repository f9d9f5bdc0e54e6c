#include "roofline.h"

#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "activations.h"
#include "blocks.h"
#include "probe.h"
#include "quant.h"
#include "threads.h"

namespace nearfar {
namespace {

double now_s(Clock clock) {
  timespec t{};
  clock_gettime(clock == Clock::kCpu ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Seconds that `work` takes on `n_threads`.
template <typename Work>
double seconds_of(Clock clock, int n_threads, const Work& work) {
  const double start = now_s(clock);
  work();
  return (now_s(clock) - start) / (clock == Clock::kCpu ? n_threads : 1);
}

template <typename Work>
double best_of(int n_passes, Clock clock, int n_threads, const Work& work) {
  double best = 1e30;
  for (int pass = 0; pass < n_passes; ++pass) {
    best = std::min(best, seconds_of(clock, n_threads, work));
  }
  return std::max(best, 1e-9);
}

// A tensor type that packs into the kind.
TensorType type_of(PanelKind kind) {
  switch (kind) {
    case PanelKind::kF32:
      return TensorType::kF32;
    case PanelKind::kF16:
      return TensorType::kF16;
    case PanelKind::kBF16:
    case PanelKind::kBF16Dot:
    case PanelKind::kW8:
      return TensorType::kBF16;
    case PanelKind::kQ4:
      return TensorType::kQ4_0;
    case PanelKind::kQ4_1:
      return TensorType::kQ4_1;
    case PanelKind::kInt8:
      return TensorType::kQ8_0;
    case PanelKind::kQ2K:
      return TensorType::kQ2_K;
    case PanelKind::kQ3K:
      return TensorType::kQ3_K;
    case PanelKind::kQ4K:
      return TensorType::kQ4_K;
    case PanelKind::kQ5K:
      return TensorType::kQ5_K;
    case PanelKind::kQ6K:
      return TensorType::kQ6_K;
    case PanelKind::kT5:
    case PanelKind::kI2:
    case PanelKind::kI2Blocks:
    case PanelKind::kL3:
      break;
  }
  return TensorType::kTQ2_0;
}

// A panel of random codes under scales of zero: speed does not depend on values, and zeros keep
// every sum finite.
PackedMat random_panel(PanelKind kind, int64_t cols) {
  std::mt19937 rng(1);
  const TensorType type = type_of(kind);
  std::vector<uint8_t> raw(static_cast<size_t>(kPanelRows * row_bytes(type, cols)));
  const BlockShape block = block_shape(type);
  const bool scale_first =
      block.weights == 32 || type == TensorType::kQ4_K || type == TensorType::kQ5_K;
  const bool has_min = type == TensorType::kQ4_1 || type == TensorType::kQ2_K ||
                       type == TensorType::kQ4_K || type == TensorType::kQ5_K;
  const size_t size = static_cast<size_t>(block.bytes), n_scale = has_min ? 4 : 2;
  for (size_t i = 0; i < raw.size() && block.weights > 1; ++i) {
    const size_t at = i % size;
    const bool is_scale = scale_first ? at < n_scale : at >= size - n_scale;
    raw[i] = is_scale ? 0 : static_cast<uint8_t>(rng());
    if (type == TensorType::kTQ2_0 && kind != PanelKind::kI2Blocks) {  // code 3 fits no trit
      raw[i] &= static_cast<uint8_t>(~((raw[i] & raw[i] >> 1 & 0x55) << 1));
    }
  }
  const Floats floats = kind == PanelKind::kW8        ? Floats::kW8
                        : kind == PanelKind::kBF16Dot ? Floats::kBF16
                                                      : Floats::kExact;
  PackedMat panel = pack({type, kPanelRows, cols, raw}, 1.0f, kind, floats);
  if (panel.kind != kind) throw std::logic_error("no tensor packs into this kind");
  return panel;
}

// One panel, over and over.
PackedMat make_matrix(const Product& p) {
  const PackedMat one = random_panel(p.kind, p.cols);
  const auto n =
      static_cast<int64_t>(std::max<size_t>(1, p.n_bytes / static_cast<size_t>(one.panel_bytes)));
  PackedMat m;
  m.kind = one.kind;
  m.rows = n * kPanelRows;
  m.cols = p.cols;
  m.panel_bytes = one.panel_bytes;
  m.data = AlignedBuffer(static_cast<size_t>(n * one.panel_bytes));
  m.row_scales = AlignedBuffer(static_cast<size_t>(m.rows) * sizeof(float));
  std::memset(m.row_scales.data(), 0, m.row_scales.size());
  for (int64_t i = 0; i < n; ++i) {
    std::memcpy(m.data.data() + i * m.panel_bytes, one.data.data(), one.data.size());
  }
  return m;
}

}  // namespace

double read_bandwidth(const Kernels& k, int n_threads, size_t n_bytes, int n_passes, Clock clock) {
  constexpr size_t kSmall = 64 << 10, kLarge = 1 << 20;  // bytes of a chunk
  if (n_bytes < kSmall || n_passes < 1) {
    throw std::invalid_argument("read_bandwidth: expected at least 64 KiB and 1 pass");
  }
  const size_t chunk_bytes = n_bytes < 16 * kLarge ? kSmall : kLarge;
  const auto n_chunks = static_cast<int64_t>(n_bytes / chunk_bytes);
  ThreadPool pool(n_threads);
  AlignedBuffer buffer(n_chunks * chunk_bytes);
  const auto chunk_at = [&](int64_t chunk) { return buffer.data() + chunk * chunk_bytes; };
  pool.run(n_chunks, [&](int64_t chunk, int) {
    std::memset(chunk_at(chunk), static_cast<int>(chunk & 0xff), chunk_bytes);
  });
  const auto read = probe(k).read;
  std::atomic<uint64_t> sum{0};  // keeps the reads alive
  // A cache is read in microseconds: a pass goes over it often enough for the clock.
  const int64_t n_times = std::max<int64_t>(1, (32 << 20) / static_cast<int64_t>(buffer.size()));
  const double seconds = best_of(n_passes, clock, n_threads, [&] {
    for (int64_t i = 0; i < n_times; ++i) {
      pool.run(n_chunks, [&](int64_t chunk, int) {
        sum.fetch_add(read(chunk_at(chunk), chunk_bytes), std::memory_order_relaxed);
      });
    }
  });
  return static_cast<double>(n_times * n_chunks) * static_cast<double>(chunk_bytes) / seconds / 1e9;
}

double int8_peak(const Kernels& k, int n_threads, int n_passes, Clock clock) {
  if (n_passes < 1) throw std::invalid_argument("int8_peak: expected at least 1 pass");
  const Probe& p = probe(k);
  ThreadPool pool(n_threads);
  std::atomic<uint64_t> sum{0};
  int64_t n_steps = 64;  // of a chunk: doubled until it takes half a millisecond
  while (seconds_of(Clock::kWall, 1, [&] { sum += p.multiply(n_steps); }) < 5e-4) n_steps *= 2;
  const int64_t n_chunks = int64_t{32} * n_threads;  // small against a pass: threads end together
  const double seconds = best_of(n_passes, clock, n_threads, [&] {
    pool.run(n_chunks,
             [&](int64_t, int) { sum.fetch_add(p.multiply(n_steps), std::memory_order_relaxed); });
  });
  return static_cast<double>(n_chunks * n_steps * p.ops_per_step) / seconds / 1e9;
}

std::string int8_multiplier(const Kernels& k) { return probe(k).multiplier; }

ProductSpeed product_speed(const Kernels& k, const Product& p, Clock clock) {
  if (p.m < 1 || p.cols < 1 || p.cols % 256 != 0) {
    throw std::invalid_argument("product_speed: expected rows, and a multiple of 256 columns");
  }
  if (p.kind == PanelKind::kL3 && k.lut_tables == nullptr) {
    throw std::invalid_argument(std::string("the ") + k.isa + " kernels have no lookups");
  }
  const PackedMat w = make_matrix(p);
  std::mt19937 rng(2);
  std::vector<float> x(static_cast<size_t>(p.m * w.cols)), y(static_cast<size_t>(p.m * w.rows));
  for (float& v : x) v = static_cast<float>(rng() % 255) - 127.0f;
  QuantRows rows;
  quantize_rows(x, p.m, w.cols, w.grain(), rows);
  ThreadPool pool(p.n_threads);
  const Cut cut(w, p.m);
  const auto run = [&] {
    pool.run(cut.n_chunks(), [&](int64_t chunk, int) {
      const Cut::Part part = cut.part(chunk);
      matmul(k, w, some_rows(rows.view(), part.row, part.m), part.first, part.last,
             std::span(y).subspan(part.row * w.rows), w.rows);
    });
  };
  run();
  const double once = std::max(seconds_of(clock, p.n_threads, run), 1e-7);
  const int inner = std::clamp(static_cast<int>(2e-3 / once), 1, 1000);
  const int samples = std::clamp(static_cast<int>(p.seconds / (once * inner)), 3, 101);
  std::vector<double> seconds;
  for (int s = 0; s < samples; ++s) {
    seconds.push_back(seconds_of(clock, p.n_threads,
                                 [&] {
                                   for (int i = 0; i < inner; ++i) run();
                                 }) /
                      inner);
  }
  std::sort(seconds.begin(), seconds.end());
  return {w.rows, w.data.size(), std::max(seconds[seconds.size() / 2], 1e-9), seconds.front()};
}

}  // namespace nearfar
