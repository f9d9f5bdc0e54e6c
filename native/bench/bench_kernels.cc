// How fast each kernel reads its weights, from L2, from L3 and from memory, for some rows of x.
//
//   bench_kernels [--isa NAME] [--kind NAME] [--rows 1,2,4,8] [--level l2|l3|dram]
//                 [--threads N] [--cols K] [--cpu-time]
//
// One JSON line per measurement, after one with the machine's own read bandwidth: median seconds of
// a product, GB/s of packed weights, GOPS (a multiply-add is 2), percent of the bandwidth of
// reading that many bytes with as many threads. --cpu-time counts the process's CPU time,
// divided by the threads, instead of the wall's: for a busy machine.
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "quant.h"
#include "roofline.h"

namespace nearfar {
namespace {

struct Options {
  std::string isa, kind, level;
  std::vector<int64_t> rows{1, 2, 4, 8};
  int threads = 1;
  int64_t cols = 2560;
  bool cpu_time = false;
};

void bench(const Options& o) {
  struct Level {
    const char* name;
    size_t bytes;
  };
  // Well inside an L2 of 1 MiB, an L3 slice of 32 MiB and well beyond both.
  constexpr Level levels[] = {{"l2", 512 << 10}, {"l3", 12 << 20}, {"dram", 192 << 20}};
  const Clock clock = o.cpu_time ? Clock::kCpu : Clock::kWall;
  for (const Level& level : levels) {
    if (!o.level.empty() && o.level != level.name) continue;
    const Kernels& widest = kernels();
    const double limit = read_bandwidth(widest, o.threads, level.bytes, 9, clock);
    std::printf("{\"read\": \"%s\", \"threads\": %d, \"mb\": %.1f, \"gb_s\": %.1f}\n", level.name,
                o.threads, static_cast<double>(level.bytes) / 1e6, limit);
    for (int i = 0; i < kPanelKinds; ++i) {
      Product p;
      p.kind = static_cast<PanelKind>(i);
      p.cols = o.cols;
      p.n_bytes = level.bytes;
      p.n_threads = o.threads;
      const std::string kind(kind_name(p.kind));
      if (!o.kind.empty() && o.kind != kind) continue;
      for (std::string_view isa : isas_available()) {
        if (o.isa.empty() ? isa == "ref" : o.isa != isa) continue;
        const Kernels& k = kernels(isa);
        if (p.kind == PanelKind::kL3 && k.lut_tables == nullptr) continue;
        for (int64_t m : o.rows) {
          p.m = m;
          const ProductSpeed s = product_speed(k, p, clock);
          const double gb_s = static_cast<double>(s.n_bytes) / s.seconds / 1e9;
          const double gops = 2e-9 * static_cast<double>(m * s.rows * p.cols) / s.seconds;
          std::printf(
              "{\"kernel\": \"%s\", \"isa\": \"%s\", \"from\": \"%s\", \"threads\": %d, \"m\": %d, "
              "\"n\": %d, \"k\": %d, \"us\": %.1f, \"gb_s\": %.1f, \"gops\": %.0f, "
              "\"percent_of_read\": %.0f}\n",
              kind.c_str(), k.isa, level.name, o.threads, static_cast<int>(m),
              static_cast<int>(s.rows), static_cast<int>(p.cols), s.seconds * 1e6, gb_s, gops,
              100 * gb_s / limit);
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
