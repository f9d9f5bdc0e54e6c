#include "kernels.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "dot_gemv.h"
#include "lut_gemv.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace nearfar {
namespace {

constexpr int64_t kChunkBytes = 96 << 10;  // of panels: what one thread takes at a time
// Rows whose tables stay in L2 while all panels pass by: 32 of 6912 numbers are 1.2 MB.
constexpr int64_t kLookupRows = 32;
constexpr int64_t kLookupPanels = 2;       // at least, of a chunk: they share reads of the tables
constexpr int64_t kCacheBytes = 16 << 20;  // of weights that may stay in a cache between two tokens

struct Lookups {
  Matmul* matmul = nullptr;
  LutTables* tables = nullptr;
};

Kernels table(const char* isa, const Ops& ops, Matmul* const (&own)[kPanelKinds],
              const Lookups& lookups = {}) {
  Kernels k{isa, &ops, {}, own[static_cast<int>(PanelKind::kT5)] != nullptr, lookups.tables};
  for (int i = 0; i < kPanelKinds; ++i) k.matmul[i] = own[i] != nullptr ? own[i] : ref::kMatmul[i];
  k.matmul[static_cast<int>(PanelKind::kL3)] =
      lookups.matmul != nullptr ? lookups.matmul : ref::matmul_l3;
  return k;
}

// Bytes that kernels ask memory for ahead of their reads. Intel's hardware prefetch stops at the
// end of a 4 KiB page; on Zen 4 asking 2 or 8 KiB ahead cost 4-bit kernels a quarter of their
// speed.
int64_t fetch_ahead() {
  static const int64_t kAhead = [] {
#if defined(__x86_64__)
    return int64_t{__builtin_cpu_is("intel") ? 8192 : 0};
#else
    return int64_t{0};
#endif
  }();
  return kAhead;
}

bool always() { return true; }

#if defined(__x86_64__)
Kernels with_bf16(Kernels k) {
  k.matmul[static_cast<int>(PanelKind::kBF16Dot)] = avx512bf16::matmul_bf16_dot;
  return k;
}

// Linux gives a process the memory of tiles when it asks for it.
bool ask_for_tiles() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Level {
  Kernels kernels;
  bool (*supported)();
};

#if defined(__x86_64__)
// __builtin_cpu_supports also asks the OS whether it saves the registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avxvnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("gfni");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kBF16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25;
  constexpr unsigned kAll = kBF16 | kTiles | kInt8;
  if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) {
    return false;
  }
  static const bool kGranted = ask_for_tiles();
  return kGranted;
}
#elif defined(__aarch64__)
#if defined(__linux__)
bool has_neon_dot() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
bool has_neon_i8mm() { return has_neon_dot() && getauxval(AT_HWCAP2) & HWCAP2_I8MM; }
#elif defined(__APPLE__)
bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_neon_dot() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_neon_i8mm() { return has_neon_dot() && has_feature("hw.optional.arm.FEAT_I8MM"); }
#else  // nobody to ask
bool has_neon_dot() { return false; }
bool has_neon_i8mm() { return false; }
#endif
#endif

// Worst first.
std::span<const Level> levels() {
  static const Level kLevels[] = {
      {table("ref", ref::kOps, ref::kMatmul, {ref::matmul_l3, ref::lut_tables}), always},
#if defined(__x86_64__)
      {table("avx2", avx2::kOps, avx2::kMatmul, {avx2::matmul_l3, avx2::lut_tables}), has_avx2},
      {table("avxvnni", avx2::kOps, avxvnni::kMatmul, {avx2::matmul_l3, avx2::lut_tables}),
       has_avxvnni},
      {table("avx512", avx512::kOps, avx512::kMatmul, {avx512::matmul_l3, avx512::lut_tables}),
       has_avx512},
      {with_bf16(table("avx512bf16", avx512::kOps, avx512::kMatmul,
                       {avx512::matmul_l3, avx512::lut_tables})),
       has_avx512bf16},
      {table("amx", amx::kOps, amx::kMatmul, {avx512::matmul_l3, avx512::lut_tables}), has_amx},
#elif defined(__aarch64__)
      {table("neon", neon::kOps, neon::kMatmul, {neon::matmul_l3, neon::lut_tables}),
       always},  // part of every 64-bit ARM
      {table("neon_dot", neon::kOps, neon_dot::kMatmul, {neon::matmul_l3, neon::lut_tables}),
       has_neon_dot},
      {table("neon_i8mm", neon::kOps, neon_i8mm::kMatmul, {neon::matmul_l3, neon::lut_tables}),
       has_neon_i8mm},
#endif
  };
  return kLevels;
}

std::string joined(const std::vector<std::string_view>& names) {
  std::string s;
  for (auto name : names) s += (s.empty() ? "" : ", ") + std::string(name);
  return s;
}

}  // namespace

std::vector<std::string_view> isas_available() {
  std::vector<std::string_view> names;
  for (const Level& level : levels()) {
    if (level.supported()) names.emplace_back(level.kernels.isa);
  }
  return names;
}

const Kernels& kernels(std::string_view isa) {
  const Level* best = nullptr;
  for (const Level& level : levels()) {
    if ((isa.empty() || isa == level.kernels.isa) && level.supported()) best = &level;
  }
  if (best) return best->kernels;
  throw std::invalid_argument("no kernels for isa \"" + std::string(isa) +
                              "\": this CPU and build have " + joined(isas_available()));
}

bool has_own(const Kernels& k, PanelKind kind) {
  const auto i = static_cast<int>(kind);
  return k.matmul[i] != ref::kMatmul[i];
}

const Probe& probe(const Kernels& k) {
  [[maybe_unused]] const std::string_view isa = k.isa;
#if defined(__x86_64__)
  if (isa == "avx2") return avx2::kProbe;
  if (isa == "avxvnni") return avxvnni::kProbe;
  if (isa.starts_with("avx512") || isa == "amx") return avx512::kProbe;
#elif defined(__aarch64__)
  if (isa == "neon_dot" || isa == "neon_i8mm") return neon_dot::kProbe;
#endif
  return ref::kProbe;
}

PanelKind ternary_kind(const Kernels& k, bool lut, int64_t n_weights) {
  if (lut && k.lut_tables == nullptr) {
    throw std::invalid_argument(std::string("the ") + k.isa +
                                " kernels have no lookups: open the model with lut \"off\"");
  }
  if (lut) return PanelKind::kL3;
  return k.five_trits && n_weights / 4 > kCacheBytes ? PanelKind::kT5 : PanelKind::kI2;
}

void matmul(const Kernels& k, const PackedMat& w, const Rows& x, int64_t first, int64_t last,
            std::span<float> y, int64_t ldy) {
  if (x.cols != w.cols || x.grain != w.grain()) {
    throw std::invalid_argument(
        "activations of " + std::to_string(x.cols) + " columns, grain " + std::to_string(x.grain) +
        ": the " + std::string(kind_name(w.kind)) + " matrix expects " + std::to_string(w.cols) +
        " columns, grain " + std::to_string(w.grain()));
  }
  if (first < 0 || first > last || last > w.n_panels()) {
    throw std::invalid_argument("panels [" + std::to_string(first) + ", " + std::to_string(last) +
                                "): the matrix has " + std::to_string(w.n_panels()));
  }
  if (x.m == 0 || first == last) return;
  if (ldy < w.rows || static_cast<int64_t>(y.size()) < (x.m - 1) * ldy + w.rows) {
    throw std::invalid_argument("output of " + std::to_string(y.size()) + " values, row stride " +
                                std::to_string(ldy) + ": expected [" + std::to_string(x.m) + ", " +
                                std::to_string(w.rows) + "]");
  }
  Panels panels = w.view();
  panels.ahead = fetch_ahead();
  k.matmul[static_cast<int>(w.kind)](panels, x, first, last, y.data(), ldy);
}

void matmul(const Kernels& k, const PackedMat& w, const QuantRows& x, int64_t first, int64_t last,
            std::span<float> y, int64_t ldy) {
  matmul(k, w, x.view(), first, last, y, ldy);
}

Cut::Cut(const PackedMat& w, int64_t rows) : n_panels_(w.n_panels()), rows_(rows), group_(rows) {
  panels_ = std::max<int64_t>(1, kChunkBytes / (w.panel_bytes * std::max<int64_t>(1, rows)));
  if (w.kind == PanelKind::kL3) {
    panels_ = std::max(kLookupPanels, panels_);
    group_ = std::min(kLookupRows, rows);
  }
  group_ = std::max<int64_t>(1, group_);
  across_ = (n_panels_ + panels_ - 1) / panels_;
}

Cut::Part Cut::part(int64_t chunk) const {
  const int64_t first = chunk % across_ * panels_, row = chunk / across_ * group_;
  return {first, std::min(n_panels_, first + panels_), row, std::min(group_, rows_ - row)};
}

void matmul(const Kernels& k, const PackedMat& w, const QuantRows& x, std::span<float> y) {
  matmul(k, w, x, 0, w.n_panels(), y, w.rows);
}

}  // namespace nearfar
