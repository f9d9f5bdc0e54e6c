// As AVX-512, and attention on blocks of bf16 by tiles.
//
// For 16 queries and 64 positions: the tiles 0..3 are sums of 16 queries times 16 columns, tile 4
// is of the queries (of their weights, the second time), tiles 5..7 are of keys (values).  A tile
// adds 32 numbers of a head, or 32 positions, in one order, so a query's bits are its own.
#include "amx_tiles.h"
#include "ops_zmm.h"

namespace nearfar {
namespace {

constexpr int64_t kTileQueries = kTileRows, kTilePairs = kTileRows;
constexpr int64_t kPairBytes = 4;

inline void configure(int64_t n_queries) {
  TileConfig c;
  for (int tile = 0; tile < 8; ++tile) c.set(tile, tile < 5 ? n_queries : kTilePairs);
  c.load();
}

// sums 0..3 += x [queries, 32 n] times four columns of 16 of y, pairs [16 n, width, 2]
inline void multiply(const uint16_t* x, int64_t x_bytes, const uint16_t* y, int64_t width,
                     int64_t n) {
  const int64_t row = width * kPairBytes;
  for (int64_t i = 0; i < n; ++i) {
    const auto* p = reinterpret_cast<const uint8_t*>(y) + i * kTilePairs * row;
    _tile_loadd(4, x + i * 2 * kTilePairs, x_bytes);
    _tile_loadd(5, p, row);
    _tile_loadd(6, p + 64, row);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(7, p + 128, row);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(5, p + 192, row);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 4, 5);
  }
}

// One column of 16 instead of four: what is left of a head that is no multiple of 64.
inline void multiply_one(const uint16_t* x, int64_t x_bytes, const uint16_t* y, int64_t width,
                         int64_t n) {
  const int64_t row = width * kPairBytes;
  for (int64_t i = 0; i < n; ++i) {
    const auto* p = reinterpret_cast<const uint8_t*>(y) + i * kTilePairs * row;
    _tile_loadd(4, x + i * 2 * kTilePairs, x_bytes);
    _tile_loadd(5, p, row);
    _tile_dpbf16ps(0, 4, 5);
  }
}

// e^x for x <= 0 with a relative error under 3e-7; 0 below -80, as in ops_body.h; NaN stays.
inline __m512 exponential_of(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-80.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(counts, p, n);
}

// The scores of one query become weights exp(score - max), zero where it does not see; updates max
// and sum, and scales `out` where the max has risen.
inline void soften_row(const AttendPairs& a, int64_t query, uint16_t* weights) {
  constexpr int kVectors = kBlock / 16;
  const int64_t first = a.visible[2 * query], last = a.visible[2 * query + 1];
  if (first >= last) {  // keeps its state as it is
    __builtin_memset(weights, 0, kBlock * sizeof(uint16_t));
    return;
  }
  const uint64_t upto = last >= 64 ? ~uint64_t{0} : (uint64_t{1} << last) - 1;
  const uint64_t seen = upto & ~((uint64_t{1} << first) - 1);
  const float* scores = a.scores + query * kBlock;
  const __m512 scale = _mm512_set1_ps(a.scale), nothing = _mm512_set1_ps(-__builtin_inff());
  __m512 s[kVectors], top = _mm512_set1_ps(a.max[query]);
  for (int v = 0; v < kVectors; ++v) {
    const auto mask = static_cast<__mmask16>(seen >> (16 * v));
    s[v] = _mm512_mask_mul_ps(nothing, mask, _mm512_loadu_ps(scores + 16 * v), scale);
    top = _mm512_max_ps(top, s[v]);
  }
  const float max = _mm512_reduce_max_ps(top), before = a.max[query];
  __m512 sum = _mm512_setzero_ps();
  for (int v = 0; v < kVectors; ++v) {
    s[v] = exponential_of(_mm512_sub_ps(s[v], _mm512_set1_ps(max)));
    sum = _mm512_add_ps(sum, s[v]);
  }
  for (int v = 0; v < kVectors; v += 2) {
    _mm512_store_si512(weights + 16 * v, (__m512i)_mm512_cvtne2ps_pbh(s[v + 1], s[v]));
  }
  float kept = 1.0f;
  if (max != before) {
    const __m512 factor = exponential_of(_mm512_set1_ps(before - max));
    kept = _mm512_cvtss_f32(factor);
    float* out = a.out + query * a.head_dim;
    for (int64_t d = 0; d < a.head_dim; d += 16) {
      _mm512_storeu_ps(out + d, _mm512_mul_ps(_mm512_loadu_ps(out + d), factor));
    }
  }
  a.sum[query] = a.sum[query] * kept + _mm512_reduce_add_ps(sum);
  a.max[query] = max;
}

// scores of m <= 16 queries from `i` on
inline void score_tile(const AttendPairs& a, int64_t i, int64_t m) {
  const int64_t hd = a.head_dim, row = kBlock * sizeof(float);
  float* scores = a.scores + i * kBlock;
  configure(m);
  zero_sums();
  multiply(a.q + i * hd, hd * 2, a.k, kBlock, hd / 32);
  _tile_stored(0, scores, row);
  _tile_stored(1, scores + 16, row);
  _tile_stored(2, scores + 32, row);
  _tile_stored(3, scores + 48, row);
}

// out += weights . v for m <= 16 queries from `i` on, over n halves of the block
inline void add_tile(const AttendPairs& a, const uint16_t* weights, int64_t i, int64_t m,
                     int64_t n) {
  const int64_t hd = a.head_dim, row = hd * sizeof(float);
  float* out = a.out + i * hd;
  configure(m);
  int64_t d = 0;
  for (; d + 64 <= hd; d += 64) {
    _tile_loadd(0, out + d, row);
    _tile_loadd(1, out + d + 16, row);
    _tile_loadd(2, out + d + 32, row);
    _tile_loadd(3, out + d + 48, row);
    multiply(weights, kBlock * 2, a.v + 2 * d, hd, n);
    _tile_stored(0, out + d, row);
    _tile_stored(1, out + d + 16, row);
    _tile_stored(2, out + d + 32, row);
    _tile_stored(3, out + d + 48, row);
  }
  for (; d < hd; d += 16) {
    _tile_loadd(0, out + d, row);
    multiply_one(weights, kBlock * 2, a.v + 2 * d, hd, n);
    _tile_stored(0, out + d, row);
  }
}

// Tiles can't take what was stored just before: all scores come first, then all weights, then all
// sums.
void attend_pairs(const AttendPairs& a) {
  NF_DCHECK(a.head_dim % 32 == 0);
  constexpr int64_t kMost = 64;  // queries
  alignas(64) uint16_t weights[kMost * kBlock];
  for (int64_t begin = 0; begin < a.n_queries; begin += kMost) {
    const int64_t end = a.n_queries < begin + kMost ? a.n_queries : begin + kMost;
    const auto for_tiles = [&](const auto& f) {
      for (int64_t i = begin; i < end; i += kTileQueries) {
        f(i, end - i < kTileQueries ? end - i : kTileQueries);
      }
    };
    for_tiles([&](int64_t i, int64_t m) { score_tile(a, i, m); });
    int64_t last = 0;  // position that somebody sees
    for (int64_t i = begin; i < end; ++i) {
      soften_row(a, i, weights + (i - begin) * kBlock);
      last = a.visible[2 * i + 1] > last ? a.visible[2 * i + 1] : last;
    }
    for_tiles([&](int64_t i, int64_t m) {
      add_tile(a, weights + (i - begin) * kBlock, i, m, last > kBlock / 2 ? 2 : 1);
    });
  }
  _tile_release();
}

// 32 codes times their scales.  Converting bf16 rounds to nearest even and the numbers are not
// denormal but for scales that small, so these are the bits of ops_body.h.
inline void put_codes(const int8_t* codes, __m512 low, __m512 high, uint16_t* y) {
  const auto widen = [](const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  };
  const __m512 a = _mm512_mul_ps(widen(codes), low);
  const __m512 b = _mm512_mul_ps(widen(codes + 16), high);
  _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

void tile_keys_from_codes(const int8_t* k, const float* scales, int64_t head_dim, uint16_t* y) {
  __m512 both[8];  // each scale twice
  const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  for (int i = 0; i < 4; ++i) {
    const __m512 s = _mm512_loadu_ps(scales + 16 * i);
    both[2 * i] = _mm512_permutexvar_ps(low, s);
    both[2 * i + 1] = _mm512_permutexvar_ps(_mm512_add_epi32(low, _mm512_set1_epi32(8)), s);
  }
  for (int64_t d = 0; d < head_dim / 2; ++d) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, k += 32, y += 32) put_codes(k, both[2 * i], both[2 * i + 1], y);
  }
}

void tile_values_from_codes(const int8_t* v, const float* scales, int64_t head_dim, uint16_t* y) {
  for (int64_t j = 0; j < kBlock; j += 2) {
    const __m512 both =
        _mm512_mask_blend_ps(0xaaaa, _mm512_set1_ps(scales[j]), _mm512_set1_ps(scales[j + 1]));
    for (int64_t d = 0; d < 2 * head_dim; d += 32, v += 32, y += 32) put_codes(v, both, both, y);
  }
}

constexpr Ops with_tiles(Ops ops) {
  ops.attend_pairs = attend_pairs;
  ops.keys_from_codes = tile_keys_from_codes;
  ops.values_from_codes = tile_values_from_codes;
  return ops;
}

}  // namespace

const Ops amx::kOps = with_tiles(kTable);

}  // namespace nearfar
