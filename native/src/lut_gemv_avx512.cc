// Lookups with AVX-512: VPERMB on four 16-byte tables at once, and VPDPBUSD, which multiplies what
// came out with the signs and adds the four groups of a row to its i32 lane.
//
// Two operations for 16 rows x 12 k = 192 multiply-adds of one token, where the product itself
// takes three VPDPBUSD.  On Intel VPERMB runs on port 5 only and VPDPBUSD on ports 0 and 5, so that
// a lookup is one clock: 192 multiply-adds a clock against 128 for VPDPBUSD alone.  Larger tables
// lose there: VPERMI2B (128 entries, 5 trits) is three operations, two of them on port 5, and its
// bytes belong to 64 rows, so that they must be widened by shifts and additions instead.
// Indices and signs are unpacked once for all tokens of a tile, 2.5 operations a lookup: with four
// tokens 10.5 operations, 5.25 clocks, for 768 multiply-adds, 1.14 times the multiplier's peak.
// More tokens in registers leave less room for blocks, and each table is loaded more often.
#include <immintrin.h>

#include "check.h"
#include "lut_gemv.h"

// GCC 12's own header leaves the operand of masked-out lanes uninitialized on purpose (its bug
// 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace nearfar::avx512 {
namespace {

constexpr int kBlocks = 4;                     // of 16 rows in a panel
constexpr int kTokens = 4;                     // of a tile, at most: 16 sums
constexpr int64_t kPanels = 4;                 // that share a read of a tile's tables
constexpr int64_t kL1Units = 64;               // 32 KiB of tables: those of a tile's K block
constexpr int64_t kAhead = 4 * kLutUnitBytes;  // hardware does not prefetch across a page
constexpr int64_t kTailReads = 112;            // bytes that a unit reads of q

inline __m512i load(const void* p) { return _mm512_load_si512(p); }

// The matrix that spreads bit j of a byte over bits 7..1 of the result; with 1 added, which flips
// bit 0, a byte becomes -1 where the bit is set and +1 where it is not.
constexpr int64_t spread(int j) { return int64_t{0x0001010101010101} << j; }

inline __m512i sign(__m512i signs, int j) {
  return _mm512_gf2p8affine_epi64_epi8(signs, _mm512_set1_epi64(spread(j)), 1);
}

inline void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p) + kAhead, _MM_HINT_T0);
}

// sums [kBlocks, M, 16] += lookups of a panel and M tokens over some units. kFirst: the first look
// at this panel, which comes from memory: a third faster with prefetches, from L2 3 % slower.
template <int M, bool kFirst>
inline void add_units(const uint8_t* block, const uint8_t* const* tables, int64_t units,
                      int32_t* sums) {
  __m512i sum[kBlocks][M];
  for (int b = 0; b < kBlocks; ++b) {
    for (int m = 0; m < M; ++m) sum[b][m] = load(sums + (b * M + m) * 16);
  }
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i table_of_byte = _mm512_set1_epi32(0x30201000);  // byte c looks into table c
  constexpr int kOr = 0xea;                                     // (a & b) | c
  int64_t at = 0;
  for (int64_t u = 0; u < units; ++u, block += kLutUnitBytes) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j, at += kLutTableBytes) {
      __m512i index[kBlocks], plus_minus[kBlocks];
      for (int b = 0; b < kBlocks; ++b) {
        const uint8_t* vectors = block + b * kLutBlock;
        if (kFirst && j % 2 == 0) prefetch(vectors + j / 2 * 64);
        if (kFirst && j == 1) prefetch(vectors + 4 * 64);
        const __m512i codes = load(vectors + j / 2 * 64);
        const __m512i code = j % 2 ? _mm512_srli_epi16(codes, 4) : codes;
        index[b] = _mm512_ternarylogic_epi32(code, low, table_of_byte, kOr);
        plus_minus[b] = sign(load(vectors + 4 * 64), j);
      }
      for (int m = 0; m < M; ++m) {
        const __m512i table = load(tables[m] + at);
        for (int b = 0; b < kBlocks; ++b) {
          const __m512i entry = _mm512_permutexvar_epi8(index[b], table);
          sum[b][m] = _mm512_dpbusd_epi32(sum[b][m], entry, plus_minus[b]);
        }
      }
    }
  }
  for (int b = 0; b < kBlocks; ++b) {
    for (int m = 0; m < M; ++m) _mm512_store_si512(sums + (b * M + m) * 16, sum[b][m]);
  }
}

// M tokens, rows i.. of x, and the panels [first, last), at most kPanels.  K goes in blocks whose
// tables stay in L1 while all the panels look into them; the sums wait in between.
template <int M, bool kFirst>
inline void run_tile(const Panels& w, const Rows& x, int64_t i, int64_t first, int64_t last,
                     float* y, int64_t ldy) {
  alignas(64) int32_t sums[kPanels][kBlocks][M][16];
  for (int64_t p = first; p < last; ++p) {
    for (int b = 0; b < kBlocks; ++b) {
      const __m512i offset = load(w.data + p * w.panel_bytes + b * 64);
      const __m512i start = _mm512_sub_epi32(_mm512_setzero_si512(), offset);
      for (int m = 0; m < M; ++m) _mm512_store_si512(sums[p - first][b][m], start);
    }
  }
  const int64_t units = lut_units(w.cols);
  for (int64_t u = 0; u < units; u += kL1Units / M) {
    const int64_t n = units - u < kL1Units / M ? units - u : kL1Units / M;
    const uint8_t* tables[M];
    for (int m = 0; m < M; ++m) {
      tables[m] = x.tables + (i + m) * x.tables_stride + u * kLutUnitTables;
    }
    for (int64_t p = first; p < last; ++p) {
      const uint8_t* unit = w.data + p * w.panel_bytes + kLutHead + u * kLutUnitBytes;
      add_units<M, kFirst>(unit, tables, n, sums[p - first][0][0]);
    }
  }
  for (int64_t p = first; p < last; ++p) {
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t n = p * kPanelRows + 16 * b, rows = w.rows - n;
      if (rows <= 0) return;
      const auto mask = static_cast<__mmask16>(rows >= 16 ? 0xffff : (1 << rows) - 1);
      const __m512 row_scale = _mm512_load_ps(w.row_scales + n);
      for (int m = 0; m < M; ++m) {
        const __m512 scale = _mm512_mul_ps(row_scale, _mm512_set1_ps(x.table_scales[i + m]));
        const __m512 sum = _mm512_cvtepi32_ps(load(sums[p - first][b][m]));
        const __m512 v = _mm512_mul_ps(_mm512_mul_ps(scale, sum), _mm512_set1_ps(w.scale));
        _mm512_mask_storeu_ps(y + (i + m) * ldy + n, mask, v);
      }
    }
  }
}

template <int M, bool kFirst>
inline void run_tokens(int64_t tokens, const Panels& w, const Rows& x, int64_t i, int64_t first,
                       int64_t last, float* y, int64_t ldy) {
  if (tokens == M) return run_tile<M, kFirst>(w, x, i, first, last, y, ldy);
  if constexpr (M > 1) run_tokens<M - 1, kFirst>(tokens, w, x, i, first, last, y, ldy);
}

// The numbers of entry e of a table: trits as bytes 0..2 of lane e, byte 3 zero.
struct Patterns {
  alignas(64) int8_t trit[16][4];
  alignas(64) int32_t start[16];  // -128 * the sum of the trits: VPDPBUSD takes q + 128
};
constexpr Patterns make_patterns() {
  Patterns p{};
  for (int e = 0; e < kLutCodes; ++e) {
    for (int i = 0; i < kLutGroup; ++i) {
      p.trit[e][i] = static_cast<int8_t>(lut_trit(e, i));
      p.start[e] -= 128 * lut_trit(e, i);
    }
  }
  return p;
}
constexpr Patterns kPatterns = make_patterns();

// Bytes 3 g .. 3 g + 2 into lane g.
struct Spread {
  alignas(64) uint8_t byte[64];
};
constexpr Spread make_spread() {
  Spread s{};
  for (int g = 0; g < 16; ++g) {
    for (int i = 0; i < 4; ++i) s.byte[4 * g + i] = static_cast<uint8_t>(3 * g + (i < 3 ? i : 0));
  }
  return s;
}
constexpr Spread kSpread = make_spread();

// Calls work(pointer to at least kTailReads bytes of q, zeros beyond cols) for each unit.
template <class Work>
inline void for_each_unit(const int8_t* q, int64_t cols, const Work& work) {
  for (int64_t k = 0; k < cols; k += kLutUnit) {
    if (k + kTailReads <= cols) {
      work(q + k);
      continue;
    }
    int8_t tail[kTailReads] = {};
    const int64_t left = cols - k < kLutUnit ? cols - k : kLutUnit;
    for (int64_t i = 0; i < left; ++i) tail[i] = q[k + i];
    work(tail);
  }
}

}  // namespace

void matmul_l3(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y, int64_t ldy) {
  NF_DCHECK(w.cols == x.cols);
  const int64_t n_tiles = (x.m + kTokens - 1) / kTokens;
  for (int64_t p = first; p < last; p += kPanels) {
    const int64_t end_panel = last - p < kPanels ? last : p + kPanels;
    for (int64_t tile = 0; tile < n_tiles; ++tile) {
      const int64_t i = tile * x.m / n_tiles, end = (tile + 1) * x.m / n_tiles;
      if (tile == 0) {
        run_tokens<kTokens, true>(end - i, w, x, i, p, end_panel, y, ldy);
      } else {
        run_tokens<kTokens, false>(end - i, w, x, i, p, end_panel, y, ldy);
      }
    }
  }
}

float lut_tables(const int8_t* q, int64_t cols, uint8_t* tables) {
  __m512i most = _mm512_setzero_si512();
  const __m512i threes = load(kSpread.byte), count = _mm512_set1_epi32(0x00010101);
  for_each_unit(q, cols, [&](const int8_t* unit) {
    for (int half = 0; half < 2; ++half) {
      const __m512i x = _mm512_permutexvar_epi8(threes, _mm512_loadu_si512(unit + 48 * half));
      most = _mm512_max_epi32(
          most, _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_abs_epi8(x), count));
    }
  });
  const int max = _mm512_reduce_max_epi32(most);
  const float f = max <= 127 ? 1.0f : 127.0f / static_cast<float>(max);

  // Adding 1.5 * 2^23 + 128 rounds to nearest even and leaves the byte in the low bits of the sum.
  const __m512 factor = _mm512_set1_ps(f), round = _mm512_set1_ps(12582912.0f + 128.0f);
  const __m512i trits = load(kPatterns.trit), start = load(kPatterns.start);
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  for_each_unit(q, cols, [&](const int8_t* unit) {
    for (int64_t k = 0; k < kLutUnit; k += kLutGroup, tables += 16) {
      int32_t group;
      __builtin_memcpy(&group, unit + k, 4);
      const __m512i x = _mm512_xor_si512(_mm512_set1_epi32(group), flip);
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, x, trits));
      const __m512i entry = _mm512_castps_si512(_mm512_fmadd_ps(sum, factor, round));
      _mm_store_si128(reinterpret_cast<__m128i*>(tables), _mm512_cvtepi32_epi8(entry));
    }
  });
  return max <= 127 ? 1.0f : static_cast<float>(max) / 127.0f;
}

}  // namespace nearfar::avx512
