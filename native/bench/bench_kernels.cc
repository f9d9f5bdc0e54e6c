// How fast each kernel reads its weights, from L2, from L3 and from memory, for some rows of x.
//
//   bench_kernels [--isa NAME] [--kind NAME] [--rows 1,2,4,8] [--level l2|l3|dram]
//                 [--threads N] [--cols K] [--cpu-time]
//
// One JSON line per measurement, after one with the machine's own read bandwidth: median seconds of
// a product, GB/s of packed weights, GOPS (a multiply-add is 2), percent of the bandwidth of
// reading that many bytes with as many threads. --cpu-time counts the CPU time of one thread
// instead of the wall: for a busy machine.
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "bandwidth.h"
#include "blocks.h"
#include "kernels.h"
#include "threads.h"

namespace nearfar {
namespace {

struct Options {
  std::string isa, kind, level;
  std::vector<int64_t> rows{1, 2, 4, 8};
  int threads = 1;
  int64_t cols = 2560;
  bool cpu_time = false;
};

struct Kind {
  TensorType type;
  PanelKind ternary = PanelKind::kI2;  // what random trits become; random TQ2_0 holds code 3
};
constexpr Kind kKinds[] = {{TensorType::kTQ1_0, PanelKind::kT5},
                           {TensorType::kTQ1_0, PanelKind::kL3},
                           {TensorType::kTQ2_0},
                           {TensorType::kQ2_K},
                           {TensorType::kQ3_K},
                           {TensorType::kQ4_0},
                           {TensorType::kQ4_1},
                           {TensorType::kQ4_K},
                           {TensorType::kQ5_K},
                           {TensorType::kQ6_K},
                           {TensorType::kQ8_0},
                           {TensorType::kF16},
                           {TensorType::kBF16},
                           {TensorType::kF32}};

double now_s(const Options& o) {
  timespec t{};
  clock_gettime(o.cpu_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Panels of about `bytes` in all: one panel of random codes and zero scales, over and over. Speed
// does not depend on the values; zeros keep every sum finite.
PackedMat make_matrix(const Kind& kind, int64_t cols, size_t bytes) {
  const TensorType type = kind.type;
  std::mt19937 rng(1);
  std::vector<uint8_t> raw(static_cast<size_t>(kPanelRows * row_bytes(type, cols)));
  const bool is_float = block_shape(type).weights == 1;
  if (!is_float) {
    const BlockShape block = block_shape(type);
    const bool scale_first =
        block.weights == 32 || type == TensorType::kQ4_K || type == TensorType::kQ5_K;
    const bool has_min = type == TensorType::kQ4_1 || type == TensorType::kQ2_K ||
                         type == TensorType::kQ4_K || type == TensorType::kQ5_K;
    const size_t size = static_cast<size_t>(block.bytes), n_scale = has_min ? 4 : 2;
    for (size_t i = 0; i < raw.size(); ++i) {
      const size_t at = i % size;
      const bool is_scale = scale_first ? at < n_scale : at >= size - n_scale;
      raw[i] = is_scale ? 0 : static_cast<uint8_t>(rng());
    }
  }
  const PackedMat one = pack({type, kPanelRows, cols, raw}, 1.0f, kind.ternary);
  const auto n =
      static_cast<int64_t>(std::max<size_t>(1, bytes / static_cast<size_t>(one.panel_bytes)));
  PackedMat m;
  m.kind = one.kind;
  m.rows = n * kPanelRows;
  m.cols = cols;
  m.panel_bytes = one.panel_bytes;
  m.data = AlignedBuffer(static_cast<size_t>(n * one.panel_bytes));
  m.row_scales = AlignedBuffer(static_cast<size_t>(m.rows) * sizeof(float));
  std::memset(m.row_scales.data(), 0, m.row_scales.size());
  for (int64_t p = 0; p < n; ++p) {
    std::memcpy(m.data.data() + p * m.panel_bytes, one.data.data(), one.data.size());
  }
  return m;
}

// Median seconds of one product.
double measure(const Options& o, const Kernels& k, const PackedMat& w, int64_t m,
               ThreadPool& pool) {
  std::mt19937 rng(2);
  std::vector<float> x(static_cast<size_t>(m * w.cols)), y(static_cast<size_t>(m * w.rows));
  for (float& v : x) v = static_cast<float>(rng() % 255) - 127.0f;
  QuantRows rows;
  quantize_rows(x, m, w.cols, w.grain(), rows);
  const int64_t per_chunk = std::max<int64_t>(1, (96 << 10) / w.panel_bytes);
  const int64_t n_chunks = (w.n_panels() + per_chunk - 1) / per_chunk;
  const auto run = [&] {
    pool.run(n_chunks, [&](int64_t chunk, int) {
      const int64_t last = std::min(w.n_panels(), (chunk + 1) * per_chunk);
      matmul(k, w, rows, chunk * per_chunk, last, y, w.rows);
    });
  };
  run();
  const double first = now_s(o);
  run();
  const double once = now_s(o) - first;
  const int inner = std::clamp(static_cast<int>(2e-3 / std::max(once, 1e-7)), 1, 1000);
  const int samples = std::clamp(static_cast<int>(0.3 / std::max(once * inner, 1e-4)), 3, 31);
  std::vector<double> seconds;
  for (int s = 0; s < samples; ++s) {
    const double start = now_s(o);
    for (int i = 0; i < inner; ++i) run();
    seconds.push_back((now_s(o) - start) / inner);
  }
  std::nth_element(seconds.begin(), seconds.begin() + samples / 2, seconds.end());
  return seconds[static_cast<size_t>(samples / 2)];
}

void bench(const Options& o) {
  struct Level {
    const char* name;
    size_t bytes;
  };
  // Well inside an L2 of 1 MiB, an L3 slice of 32 MiB and well beyond both.
  constexpr Level levels[] = {{"l2", 512 << 10}, {"l3", 12 << 20}, {"dram", 192 << 20}};
  ThreadPool pool(o.threads);
  for (const Level& level : levels) {
    if (!o.level.empty() && o.level != level.name) continue;
    const int passes = level.bytes < (64 << 20) ? 200 : 9;
    const double limit = read_bandwidth(o.threads, std::max(level.bytes, size_t{1} << 20), passes);
    std::printf("{\"read\": \"%s\", \"threads\": %d, \"mb\": %.1f, \"gb_s\": %.1f}\n", level.name,
                o.threads, static_cast<double>(level.bytes) / 1e6, limit);
    for (const Kind& kind : kKinds) {
      const PackedMat w = make_matrix(kind, o.cols, level.bytes);
      if (!o.kind.empty() && o.kind != kind_name(w.kind)) continue;
      for (std::string_view isa : isas_available()) {
        if (o.isa.empty() ? isa == "ref" : o.isa != isa) continue;
        if (w.kind == PanelKind::kL3 && kernels(isa).lut_tables == nullptr) continue;
        for (int64_t m : o.rows) {
          const double s = measure(o, kernels(isa), w, m, pool);
          const double gb_s = static_cast<double>(w.data.size()) / s / 1e9;
          const double gops = 2e-9 * static_cast<double>(m * w.rows * w.cols) / s;
          std::printf(
              "{\"kernel\": \"%s\", \"isa\": \"%s\", \"from\": \"%s\", \"threads\": %d, \"m\": %d, "
              "\"n\": %d, \"k\": %d, \"us\": %.1f, \"gb_s\": %.1f, \"gops\": %.0f, "
              "\"percent_of_read\": %.0f}\n",
              std::string(kind_name(w.kind)).c_str(), std::string(isa).c_str(), level.name,
              o.threads, static_cast<int>(m), static_cast<int>(w.rows), static_cast<int>(w.cols),
              s * 1e6, gb_s, gops, 100 * gb_s / limit);
          std::fflush(stdout);
        }
      }
    }
  }
}

std::vector<int64_t> numbers(const std::string& s) {
  std::vector<int64_t> out;
  for (size_t i = 0; i < s.size();) {
    const size_t comma = std::min(s.find(',', i), s.size());
    out.push_back(std::stol(s.substr(i, comma - i)));
    i = comma + 1;
  }
  return out;
}

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--cpu-time") {
      o.cpu_time = true;
      continue;
    }
    if (i + 1 == argc) throw std::invalid_argument(name + ": unknown, or its value is missing");
    const std::string value = argv[++i];
    if (name == "--isa")
      o.isa = std::string(kernels(value).isa);
    else if (name == "--kind")
      o.kind = value;
    else if (name == "--level")
      o.level = value;
    else if (name == "--rows")
      o.rows = numbers(value);
    else if (name == "--threads")
      o.threads = static_cast<int>(numbers(value).at(0));
    else if (name == "--cols")
      o.cols = numbers(value).at(0);
    else
      throw std::invalid_argument(name + ": unknown option");
  }
  return o;
}

}  // namespace
}  // namespace nearfar

int main(int argc, char** argv) {
  try {
    nearfar::bench(nearfar::parse(argc, argv));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "bench_kernels: %s\n", e.what());
    return 2;
  }
}
