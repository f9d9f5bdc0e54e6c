// Lookups with AVX2: VPSHUFB on two 16-byte tables at once.
//
// It looks into one table for the 16 bytes of a lane, so the codes of 16 rows are transposed from
// [row][group] to [group][row], once for up to kTokens tokens; what comes out for two groups is
// interleaved, and VPMADDUBSW multiplies with the signs and adds the two:
//   2 VPSHUFB, 2 VPUNPCK, 2 VPMADDUBSW, 2 VPADDW for 16 rows x 12 k = 192 multiply-adds of a token,
// 72 a clock on three ports, where VPMADDUBSW on 2-bit codes and its addition give 48.
//
// An int16 takes 2 * 255 = 510 a lookup: 64 lookups, 32640, then it is added to an i32.
#include <immintrin.h>

#include "check.h"
#include "lut_gemv.h"

namespace nearfar::avx2 {
namespace {

constexpr int kTile = 4;         // tokens of a tile: 8 registers of sums
constexpr int64_t kTokens = 32;  // that share a transposition
constexpr int kPair = 2;         // blocks of 16 rows: 16 KiB of codes and signs beside 16 of tables
constexpr int64_t kUnits = 8;    // of a K block: 64 lookups
constexpr int64_t kLookups = kUnits * 8;

// Codes and signs of 16 rows, by lookup: bytes [c0 | c1] and [c2 | c3] of 16 rows each as indices,
// and +-1 in the order of the interleaved entries.
struct Transposed {
  alignas(32) uint8_t index[kLookups][64];
  alignas(32) int8_t sign[kLookups][64];
};

inline __m256i load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, __m256i v) { _mm256_store_si256(static_cast<__m256i*>(p), v); }

// Two groups of 16 rows, in the row order 0..3, 8..11, 4..7, 12..15.
struct Groups {
  __m256i c01, c23;
};
inline Groups transpose(const uint8_t* bytes) {
  const __m256i by_group = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m256i a = _mm256_shuffle_epi8(load(bytes), by_group);
  const __m256i b = _mm256_shuffle_epi8(load(bytes + 32), by_group);
  return {_mm256_permute4x64_epi64(_mm256_unpacklo_epi32(a, b), 0xd8),
          _mm256_permute4x64_epi64(_mm256_unpackhi_epi32(a, b), 0xd8)};
}

inline void transpose_units(const uint8_t* block, int64_t units, Transposed& out) {
  const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi8(1);
  for (int64_t u = 0; u < units; ++u, block += kLutUnitBytes) {
    for (int64_t v = 0; v < 4; ++v) {
      const Groups g = transpose(block + 64 * v);
      uint8_t* even = out.index[8 * u + 2 * v];
      store(even, _mm256_and_si256(g.c01, low));
      store(even + 32, _mm256_and_si256(g.c23, low));
      store(even + 64, _mm256_and_si256(_mm256_srli_epi16(g.c01, 4), low));
      store(even + 96, _mm256_and_si256(_mm256_srli_epi16(g.c23, 4), low));
    }
    const Groups g = transpose(block + 4 * 64);
    __m256i first = _mm256_unpacklo_epi8(g.c01, g.c23);
    __m256i second = _mm256_unpackhi_epi8(g.c01, g.c23);
    for (int64_t j = 7; j >= 0; --j) {  // bit j has come to the top of its byte
      store(out.sign[8 * u + j], _mm256_sign_epi8(one, _mm256_or_si256(first, one)));
      store(out.sign[8 * u + j] + 32, _mm256_sign_epi8(one, _mm256_or_si256(second, one)));
      first = _mm256_slli_epi16(first, 1);
      second = _mm256_slli_epi16(second, 1);
    }
  }
}

// sums[8] += the numbers of both halves: groups c0, c2 in the one, c1, c3 in the other.
inline __m256i widen(__m256i sum) {
  return _mm256_add_epi32(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(sum)),
                          _mm256_cvtepi16_epi32(_mm256_extracti128_si256(sum, 1)));
}

// sums [M, 16] += lookups of 16 rows and M tokens.
template <int M>
inline void add_lookups(const Transposed& t, int64_t lookups, const uint8_t* const* tables,
                        int32_t (*sums)[kPair][16], int pair) {
  __m256i first[M], second[M];
  for (int m = 0; m < M; ++m) first[m] = second[m] = _mm256_setzero_si256();
  for (int64_t j = 0; j < lookups; ++j) {
    const __m256i index01 = load(t.index[j]), index23 = load(t.index[j] + 32);
    const __m256i sign_first = load(t.sign[j]), sign_second = load(t.sign[j] + 32);
    for (int m = 0; m < M; ++m) {
      const uint8_t* table = tables[m] + j * kLutTableBytes;
      const __m256i e01 = _mm256_shuffle_epi8(load(table), index01);
      const __m256i e23 = _mm256_shuffle_epi8(load(table + 32), index23);
      first[m] = _mm256_add_epi16(first[m],
                                  _mm256_maddubs_epi16(_mm256_unpacklo_epi8(e01, e23), sign_first));
      second[m] = _mm256_add_epi16(
          second[m], _mm256_maddubs_epi16(_mm256_unpackhi_epi8(e01, e23), sign_second));
    }
  }
  for (int m = 0; m < M; ++m) {
    const __m256i a = widen(first[m]), b = widen(second[m]);  // rows 0..3, 8..11 and 4..7, 12..15
    int32_t* sum = sums[m][pair];
    store(sum, _mm256_add_epi32(load(sum), _mm256_permute2x128_si256(a, b, 0x20)));
    store(sum + 8, _mm256_add_epi32(load(sum + 8), _mm256_permute2x128_si256(a, b, 0x31)));
  }
}

template <int M>
inline void add_tile(int64_t tokens, const Transposed& t, int64_t lookups,
                     const uint8_t* const* tables, int32_t (*sums)[kPair][16], int pair) {
  if (tokens == M) return add_lookups<M>(t, lookups, tables, sums, pair);
  if constexpr (M > 1) add_tile<M - 1>(tokens, t, lookups, tables, sums, pair);
}

// y = (row_scale * table_scale) * sum * scale for the rows n.. of w that exist, at most 16
inline void store_rows(const Panels& w, int64_t n, float table_scale, const int32_t* sum,
                       float* y) {
  const int64_t rows = w.rows - n < 16 ? w.rows - n : 16;
  for (int64_t r = 0; r < rows; ++r) {
    y[n + r] = w.row_scales[n + r] * table_scale * static_cast<float>(sum[r]) * w.scale;
  }
}

// The rows [i, i + tokens) of x and two blocks of 16 rows of a panel.
inline void run(const Panels& w, const Rows& x, int64_t i, int64_t tokens, int64_t panel,
                int64_t block, float* y, int64_t ldy) {
  alignas(32) int32_t sums[kTokens][kPair][16];
  Transposed transposed[kPair];
  const uint8_t* p = w.data + panel * w.panel_bytes;
  for (int64_t m = 0; m < tokens; ++m) {
    for (int64_t b = 0; b < kPair; ++b) {
      for (int64_t half = 0; half < 2; ++half) {
        const __m256i offset = load(p + (block + b) * 64 + half * 32);
        store(sums[m][b] + half * 8, _mm256_sub_epi32(_mm256_setzero_si256(), offset));
      }
    }
  }
  const int64_t units = lut_units(w.cols);
  for (int64_t u = 0; u < units; u += kUnits) {
    const int64_t n = units - u < kUnits ? units - u : kUnits;
    const uint8_t* unit = p + kLutHead + u * kLutUnitBytes + block * kLutBlock;
    for (int b = 0; b < kPair; ++b) transpose_units(unit + b * kLutBlock, n, transposed[b]);
    for (int64_t m = 0; m < tokens; m += kTile) {
      const int64_t tile = tokens - m < kTile ? tokens - m : kTile;
      const uint8_t* tables[kTile];
      for (int64_t t = 0; t < tile; ++t) {
        tables[t] = x.tables + (i + m + t) * x.tables_stride + u * kLutUnitTables;
      }
      for (int b = 0; b < kPair; ++b) {
        add_tile<kTile>(tile, transposed[b], 8 * n, tables, sums + m, b);
      }
    }
  }
  for (int64_t m = 0; m < tokens; ++m) {
    for (int64_t b = 0; b < kPair; ++b) {
      store_rows(w, panel * kPanelRows + (block + b) * 16, x.table_scales[i + m], sums[m][b],
                 y + (i + m) * ldy);
    }
  }
}

// Trits of the entries, for VPMADDWD: lane e of `first` multiplies q0 and q1, of `last` q2.
struct Patterns {
  alignas(32) int16_t first[16][2];
  alignas(32) int16_t last[16][2];
};
constexpr Patterns make_patterns() {
  Patterns p{};
  for (int e = 0; e < kLutCodes; ++e) {
    p.first[e][0] = static_cast<int16_t>(lut_trit(e, 0));
    p.first[e][1] = static_cast<int16_t>(lut_trit(e, 1));
    p.last[e][0] = static_cast<int16_t>(lut_trit(e, 2));
  }
  return p;
}
constexpr Patterns kPatterns = make_patterns();

}  // namespace

void matmul_l3(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y, int64_t ldy) {
  NF_DCHECK(w.cols == x.cols);
  for (int64_t i = 0; i < x.m; i += kTokens) {
    const int64_t tokens = x.m - i < kTokens ? x.m - i : kTokens;
    for (int64_t p = first; p < last; ++p) {
      for (int64_t block = 0; block < 4 && p * kPanelRows + block * 16 < w.rows; block += kPair) {
        run(w, x, i, tokens, p, block, y, ldy);
      }
    }
  }
}

float lut_tables(const int8_t* q, int64_t cols, uint8_t* tables) {
  const auto at = [&](int64_t k) { return k < cols ? static_cast<int>(q[k]) : 0; };
  const auto magnitude = [&](int64_t k) { return at(k) < 0 ? -at(k) : at(k); };
  int most = 0;
  for (int64_t k = 0; k < cols; k += kLutGroup) {
    const int sum = magnitude(k) + magnitude(k + 1) + magnitude(k + 2);
    most = sum > most ? sum : most;
  }
  const float f = most <= 127 ? 1.0f : 127.0f / static_cast<float>(most);

  // Adding 1.5 * 2^23 + 128 rounds to nearest even and leaves the byte in the low bits of the sum.
  const __m256 factor = _mm256_set1_ps(f), round = _mm256_set1_ps(12582912.0f + 128.0f);
  const __m256i byte = _mm256_set1_epi32(255);
  for (int64_t k = 0; k < lut_units(cols) * kLutUnit; k += kLutGroup, tables += 16) {
    const __m256i q01 = _mm256_set1_epi32((at(k) & 0xffff) | at(k + 1) * 65536);
    const __m256i q2 = _mm256_set1_epi32(at(k + 2) & 0xffff);
    __m256i entry[2];
    for (int half = 0; half < 2; ++half) {
      const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(q01, load(kPatterns.first[8 * half])),
                                           _mm256_madd_epi16(q2, load(kPatterns.last[8 * half])));
      const __m256 rounded = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), factor, round);
      entry[half] = _mm256_and_si256(_mm256_castps_si256(rounded), byte);
    }
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(entry[0], entry[1]), 0xd8);
    const __m128i bytes =
        _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_store_si128(reinterpret_cast<__m128i*>(tables), bytes);
  }
  return most <= 127 ? 1.0f : static_cast<float>(most) / 127.0f;
}

}  // namespace nearfar::avx2
