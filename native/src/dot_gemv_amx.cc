// AMX kernels: Sapphire Rapids and later (AMX-INT8, AMX-BF16, and AVX-512 for all else).
//
// A tile is 16 rows of 64 bytes, and one instruction multiplies two of them: 16 rows of x times 16
// rows of w, 64 k of bytes or 32 k of bf16.  A block of a panel is a row of such a tile already.
//
//   tiles 0..3   sums     32 rows of x times 32 rows of w, or 16 times 64
//   tiles 4, 5   x        tiles 6, 7   w           (16 times 64: x in 4, w in 5, 6, 7)
//
// Integer sums are exact, so codes have the bits of `ref`.  Products of bf16 are added in an order
// of their own (32 k at a time, even and odd k apart), which is the same for any number of rows.
#include <immintrin.h>

#include "amx_tiles.h"
#include "dot_gemv.h"

namespace nearfar {
namespace {

constexpr int64_t kManyRows = 8, kManySteps = 16;

inline void add_many(const uint8_t* codes, const int8_t* q, int64_t q_stride, int64_t m,
                     int64_t n_steps, const uint8_t* next, bool fresh, int32_t* sums);

}  // namespace
}  // namespace nearfar

#include "dot_gemv_zmm.h"

namespace nearfar {
namespace {

constexpr int64_t kRun = 8;  // tiles of a run: 16 KiB of 32 rows
constexpr int64_t kAhead =
    16 << 10;  // bytes between what few rows of x multiply and what is fetched

// Tiles for `first` and `second` rows of x, 1..16; second may be 0.
inline void configure(int64_t first, int64_t second) {
  const int64_t more = second > 0 ? second : first;
  TileConfig c;
  for (int tile = 0; tile < 4; ++tile) c.set(tile, tile < 2 ? first : more);
  c.set(4, first);
  c.set(5, second > 0 ? second : kTileRows);
  c.set(6, kTileRows);
  c.set(7, kTileRows);
  c.load();
}

// The products of both element types; two k of bf16, or four of int8, are 4 bytes.  A macro, for
// the numbers of tiles stand in the text of the instructions.
enum class Number { kInt8, kBF16 };
#define NF_MULTIPLY(sum, x, w)              \
  if constexpr (kNumber == Number::kInt8) { \
    _tile_dpbsud(sum, x, w);                \
  } else {                                  \
    _tile_dpbf16ps(sum, x, w);              \
  }

// What comes from memory next, into L2 or L1: `bytes` of it at a time, evenly over all the work, so
// that memory does not wait for the tiles either.
struct Next {
  const uint8_t* p;
  int64_t bytes;
  bool is_near;  // into L1 already

  void fetch() {
    for (int64_t i = 0; i < bytes; i += 64) {
      const auto* line = reinterpret_cast<const char*>(p + i);
      if (is_near) {
        _mm_prefetch(line, _MM_HINT_T0);
      } else {
        _mm_prefetch(line, _MM_HINT_T1);
      }
    }
    p += bytes;
  }
};

// Where m rows of x meet a panel: sums [m][64] = or += x . w over n tiles of 16 steps.
struct Meeting {
  const uint8_t *w, *x;
  int64_t x_stride;  // bytes
  int64_t m, n;
  Next next;
  bool fresh;
  uint8_t* sums;
};

// 16 rows of x times the 64 rows of a panel; x, w and sums are those of the first tile.
template <Number kNumber>
inline void add_one(const Meeting& c, const uint8_t* w, const uint8_t* x, int64_t n, bool fresh,
                    Next& next, uint8_t* sums) {
  if (fresh) {
    zero_sums();
  } else {
    _tile_loadd(0, sums, kStep);
    _tile_loadd(1, sums + 64, kStep);
    _tile_loadd(2, sums + 128, kStep);
    _tile_loadd(3, sums + 192, kStep);
  }
  for (int64_t s = 0; s < n; ++s, w += kTileRows * kStep, x += kTileBytes) {
    next.fetch();
    _tile_loadd(4, x, c.x_stride);
    _tile_loadd(5, w, kStep);
    _tile_loadd(6, w + 64, kStep);
    NF_MULTIPLY(0, 4, 5)
    _tile_loadd(7, w + 128, kStep);
    NF_MULTIPLY(1, 4, 6)
    _tile_loadd(5, w + 192, kStep);
    NF_MULTIPLY(2, 4, 7)
    NF_MULTIPLY(3, 4, 5)
  }
  _tile_stored(0, sums, kStep);
  _tile_stored(1, sums + 64, kStep);
  _tile_stored(2, sums + 128, kStep);
  _tile_stored(3, sums + 192, kStep);
}

// 32 rows of x times 32 rows of a panel.
template <Number kNumber>
inline void add_two(const Meeting& c, const uint8_t* w, const uint8_t* x, int64_t n, bool fresh,
                    Next& next, uint8_t* sums) {
  const uint8_t* more_x = x + kTileRows * c.x_stride;
  uint8_t* more_sums = sums + kTileRows * kStep;
  if (fresh) {
    zero_sums();
  } else {
    _tile_loadd(0, sums, kStep);
    _tile_loadd(1, sums + 64, kStep);
    _tile_loadd(2, more_sums, kStep);
    _tile_loadd(3, more_sums + 64, kStep);
  }
  for (int64_t s = 0; s < n; ++s, w += kTileRows * kStep, x += kTileBytes, more_x += kTileBytes) {
    next.fetch();
    _tile_loadd(4, x, c.x_stride);
    _tile_loadd(6, w, kStep);
    _tile_loadd(7, w + 64, kStep);
    NF_MULTIPLY(0, 4, 6)
    _tile_loadd(5, more_x, c.x_stride);
    NF_MULTIPLY(1, 4, 7)
    NF_MULTIPLY(2, 5, 6)
    NF_MULTIPLY(3, 5, 7)
  }
  _tile_stored(0, sums, kStep);
  _tile_stored(1, sums + 64, kStep);
  _tile_stored(2, more_sums, kStep);
  _tile_stored(3, more_sums + 64, kStep);
}

// Where many rows meet a panel, a run of a half of it stays in L1 while they pass by: tiles that
// came from L2 each time would wait for it.
template <Number kNumber>
inline void multiply(const Meeting& c) {
  constexpr int64_t kHalf = 128;  // bytes
  const int64_t run = c.m > kTileRows ? kRun : c.n;
  int64_t shape[2] = {0, 0};
  Next next = c.next, nothing = {c.w, 0, false};
  for (int64_t s = 0; s < c.n; s += run) {
    const int64_t n = c.n - s < run ? c.n - s : run;
    const uint8_t* w = c.w + s * kTileRows * kStep;
    const bool fresh = c.fresh && s == 0;
    for (int64_t half = 0; half < 2; ++half) {
      for (int64_t i = 0; i < c.m; i += 2 * kTileRows) {
        const int64_t left = c.m - i, first = left < kTileRows ? left : kTileRows;
        const int64_t second = left - first < kTileRows ? left - first : kTileRows;
        if (second == 0 && half == 1) continue;
        if (first != shape[0] || second != shape[1]) configure(first, second);
        shape[0] = first;
        shape[1] = second;
        const uint8_t* x = c.x + i * c.x_stride + s * kTileBytes;
        uint8_t* sums = c.sums + i * kStep;
        Next& fetched = i == 0 ? next : nothing;
        if (second == 0) {
          add_one<kNumber>(c, w, x, n, fresh, fetched, sums);
        } else {
          add_two<kNumber>(c, w + half * kHalf, x, n, fresh, fetched, sums + half * kHalf);
        }
      }
    }
  }
}

// A run ahead, over the end of the panel; half of its lines with each half of this one.
inline Next run_behind(const Call& c) {
  if (c.m <= kTileRows) return {c.panel + kAhead, kTileRows * kStep, true};
  return {c.panel + kRun * kTileRows * kStep, kTileRows * kStep / 2, false};
}

inline void add_many(const uint8_t* codes, const int8_t* q, int64_t q_stride, int64_t m,
                     int64_t n_steps, const uint8_t* next, bool fresh, int32_t* sums) {
  multiply<Number::kInt8>({codes,
                           reinterpret_cast<const uint8_t*>(q),
                           q_stride,
                           m,
                           n_steps / kManySteps,
                           {next, 64 * kManySteps / (m > kTileRows ? 2 : 1), false},
                           fresh,
                           reinterpret_cast<uint8_t*>(sums)});
}

// Bytes are tiles already: no stretch of them is unpacked.
struct W8Tiles {
  static void run(const Call& c) {
    if (c.m < kManyRows) return W8::run(c);
    alignas(64) int32_t sums[kChunk * 64];
    multiply<Number::kInt8>({c.panel, reinterpret_cast<const uint8_t*>(c.q(0)), c.x.q_stride, c.m,
                             c.w.panel_bytes / (kTileRows * kStep), run_behind(c), true,
                             reinterpret_cast<uint8_t*>(sums)});
    finish_rows<128>(c, sums);
  }
};

struct Bf16Tiles {
  static void run(const Call& c) {
    alignas(64) float sums[kChunk * 64];
    const auto* x = reinterpret_cast<const uint8_t*>(c.x.bf16 + c.i * c.x.bf16_stride);
    multiply<Number::kBF16>({c.panel, x, 2 * c.x.bf16_stride, c.m,
                             c.w.panel_bytes / (kTileRows * kStep), run_behind(c), true,
                             reinterpret_cast<uint8_t*>(sums)});
    for (int64_t token = 0; token < c.m; ++token) {
      for (int b = 0; b < kBlocks; ++b) {
        c.store(token, b, _mm512_load_ps(sums + token * 64 + 16 * b));
      }
    }
  }
};

// Tiles hold memory of the thread until they are released, and others may use them too.
template <class Kernel>
void tiled(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y, int64_t ldy) {
  matmul<Kernel>(w, x, first, last, y, ldy);
  _tile_release();
}

}  // namespace

Matmul* const amx::kMatmul[kPanelKinds] = {
    matmul<Float<float>>,
    matmul<Float<F16>>,
    matmul<Float<BF16>>,
    tiled<T5>,
    tiled<I2>,
    tiled<I2Blocks>,
    matmul<Grouped<PanelKind::kQ4>>,
    matmul<Grouped<PanelKind::kQ4_1>>,
    matmul<Grouped<PanelKind::kInt8>>,
    matmul<Grouped<PanelKind::kQ2K>>,
    matmul<Grouped<PanelKind::kQ3K>>,
    matmul<Grouped<PanelKind::kQ4K>>,
    matmul<Grouped<PanelKind::kQ5K>>,
    matmul<Grouped<PanelKind::kQ6K>>,
    nullptr,  // kL3: lut_gemv_avx512.cc
    tiled<W8Tiles>,
    tiled<Bf16Tiles>,
};

}  // namespace nearfar
