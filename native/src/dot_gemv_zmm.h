// The body of dot_gemv_{avx512,amx}.cc: included once by each, after it has defined in an anonymous
// namespace what many rows of x multiply by instead of the tiles below, if anything:
//
//   kManyRows               from so many rows on; 0: never
//   kManySteps              and where the steps are a multiple of this
//   add_many(codes, q, q_stride, m, n_steps, next, fresh, sums)   as add_tile, for any m
//
// AVX-512: Ice Lake, Zen 4 and later (F BW VL VNNI VBMI).
//
// A zmm is a block of 16 rows x 4 k, an i32 lane a row. VPDPBUSD multiplies its 4 unsigned codes
// with 4 signed activations, broadcast from memory, and adds all to the lane without saturation. It
// is the bottleneck of prefill (one zmm a clock on Zen 4, two on Zen 5 and Intel's servers);
// everything else is there to keep it fed.
//
// Two ideas. One row of x takes codes from registers, a unit of a panel at a time: memory sets the
// pace. More rows unpack a stretch of a panel to one code a byte, in L1, and run tiles of rows of x
// over it: unpacking is paid once per 128 rows.
//
// Largest sums, |q| <= 127, all in i32 (2.1e9):
//   i2      in place, field 3, code 3: 4 * 192 * 127 = 97,536 per 16 k, so K <= 352,000;
//           pack() refuses K > 2^18
//   t5      in place, field 3 and trit 4 together, up to 128 each: 2 * 4 * 128 * 127 = 130,048 per
//           20 k, so K <= 330,000
//   w8      255 * 127 a k, and K <= 65,536: 2.122e9; 128 * sum q is taken off in the end
//   groups of 32: q4 32 * 15 * 127 = 60,960; int8 32 * 255 * 127 = 1.1e6, and as much again for the
//           start -128 * sum q; 5 and 6 bits lie between
#include <immintrin.h>

#include "dot_gemv.h"

// GCC 12's own header leaves the operand of masked-out lanes uninitialized on purpose (its bug
// 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace nearfar {
namespace {

constexpr int kBlocks = 4, kParts = kBlocks;  // of 16 rows in a panel
constexpr int64_t kStretch = 320;             // k: 20 KiB unpacked, and a multiple of 16 and 20
constexpr int64_t kSuper = 256;

using Vector = __m512i;
inline __m512i load(const uint8_t* p) { return _mm512_load_si512(p); }
inline void store(uint8_t* p, __m512i v) { _mm512_store_si512(p, v); }
inline void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}
// A line on its way from memory: into L2 first, then, when it has come near, into L1.
inline void stream(const uint8_t* p, int64_t ahead) {
  _mm_prefetch(reinterpret_cast<const char*>(p + ahead), _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char*>(p + ahead / 4), _MM_HINT_T0);
}
inline __m512i zero() { return _mm512_setzero_si512(); }
inline __m512i bytes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }

inline __m512i broadcast4(const int8_t* q) {
  int32_t v;
  __builtin_memcpy(&v, q, 4);
  return _mm512_set1_epi32(v);
}

inline __m512i broadcast_pair(const uint16_t* x) {
  int32_t v;
  __builtin_memcpy(&v, x, 4);
  return _mm512_set1_epi32(v);
}

inline __m512 load_f16(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512 load_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p))));
}
inline __m512 load_i8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p))));
}

template <int kBits>
inline __m512i shift_down(__m512i v) {
  if constexpr (kBits > 0) return _mm512_srli_epi16(v, kBits);
  if constexpr (kBits < 0) return _mm512_slli_epi16(v, -kBits);
  return v;
}

template <int kMask>
inline __m512i masked(__m512i v) {
  return _mm512_and_si512(v, bytes(kMask));
}
template <int kMask>
inline __m512i with_top(__m512i v, __m512i top) {
  return _mm512_ternarylogic_epi32(v, top, bytes(kMask), 0xf8);
}

}  // namespace
}  // namespace nearfar

#include "dot_gemv_tiles.h"

namespace nearfar {
namespace {

struct Call : CallBase {
  int32_t sum_q(int64_t token) const {
    int32_t sum = 0;
    for (int64_t j = 0; j < x.n_sums; ++j) sum += sums(token)[j];
    return sum;
  }

  // y = v * w.scale for the rows of block b that exist
  void store(int64_t token, int b, __m512 v) const {
    const int64_t rows = w.rows - n - 16 * b;
    if (rows <= 0) return;
    const auto mask = static_cast<__mmask16>(rows >= 16 ? 0xffff : (1 << rows) - 1);
    v = _mm512_mul_ps(v, _mm512_set1_ps(w.scale));
    _mm512_mask_storeu_ps(y + (i + token) * ldy + n + 16 * b, mask, v);
  }
};

// t5: the lowest 6 bits of a byte look up trits 0..3 as four 2-bit fields, and VPERMB ignores the
// others, which are trit 4.  Where those are 3 the byte is one of the 51 that did not fit, and two
// more tables say what it holds.  (VPERMI2B with its 128 entries would be three operations on
// Intel, and 81 trit4 + r four more to take apart.)
struct FieldTables {
  alignas(64) uint8_t fields[64], rest[64], trit4[64];
};
constexpr FieldTables make_field_tables() {
  FieldTables t{};
  const auto fields = [](int r) {
    return static_cast<uint8_t>(r % 3 | r / 3 % 3 << 2 | r / 9 % 3 << 4 | r / 27 % 3 << 6);
  };
  for (int i = 0; i < 64; ++i) {
    t.fields[i] = fields(i);
    t.rest[i] = fields(64 + i / 3);
    t.trit4[i] = static_cast<uint8_t>(i % 3 << 6);
  }
  return t;
}
constexpr FieldTables kFieldTables = make_field_tables();

struct FiveTrits {
  __m512i table = load(kFieldTables.fields), rest = load(kFieldTables.rest),
          trit4 = load(kFieldTables.trit4);

  // Trits 0..3 of each byte + 1 as 2-bit fields, and trit 4 + 1 in the highest two bits.
  struct Codes {
    __m512i fields, last;
  };
  Codes unpack(__m512i v) const {
    const __mmask64 did_not_fit = _mm512_cmpge_epu8_mask(v, bytes(192));
    const __m512i fields = _mm512_permutexvar_epi8(v, table);
    const __m512i last = _mm512_and_si512(v, bytes(192));
    return {_mm512_mask_permutexvar_epi8(fields, did_not_fit, v, rest),
            _mm512_mask_permutexvar_epi8(last, did_not_fit, v, trit4)};
  }
};

// ---- tiles ----

template <int M>
using Tile = __m512i[kBlocks][M];
template <int M>
using Floats = __m512[kBlocks][M];

// sum += code . a, in place: left to itself GCC copies accumulators and keeps them in memory too.
inline void add_dot(__m512i& sum, __m512i code, __m512i a) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(code), "v"(a));
}

// sum[b][m] += codes . q[m] over 4 n_steps k.  Fetches a line of `next` each step: what comes from
// memory afterwards, or what is there already.
template <int M>
inline void dot(const uint8_t* codes, const int8_t* q, int64_t q_stride, int64_t n_steps,
                const uint8_t* next, Tile<M>& sum) {
#pragma GCC unroll 1  // GCC spills accumulators of the large tiles otherwise
  for (int64_t s = 0; s < n_steps; ++s) {
    prefetch(next + s * 64);
    __m512i code[kBlocks];
    for (int b = 0; b < kBlocks; ++b) code[b] = load(codes + s * kStep + 64 * b);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const __m512i a = broadcast4(q + m * q_stride + 4 * s);
      for (int b = 0; b < kBlocks; ++b) add_dot(sum[b][m], code[b], a);
    }
  }
}

// ---- Scheme::kRow: i32 sums over all of K ----

// y from sum q*code, [kChunk][64] as the tiles left them
template <int kOffset = 1>
inline void finish_rows(const Call& c, const int32_t* sums) {
  for (int64_t token = 0; token < c.m; ++token) {
    const __m512i offset = _mm512_set1_epi32(kOffset * c.sum_q(token));
    const __m512 s_x = _mm512_set1_ps(c.scales(token)[0]);
    for (int b = 0; b < kBlocks; ++b) {
      const __m512i trits = _mm512_sub_epi32(_mm512_load_si512(sums + token * 64 + 16 * b), offset);
      const __m512 scale = _mm512_mul_ps(_mm512_load_ps(c.w.row_scales + c.n + 16 * b), s_x);
      c.store(token, b, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(trits)));
    }
  }
}

// Unpacked codes against M tokens: sums [M][64] are added to, or made where `fresh`.
template <int M>
__attribute__((noinline)) void add_tile(const uint8_t* codes, const int8_t* q, int64_t q_stride,
                                        int64_t n_steps, const uint8_t* next, bool fresh,
                                        int32_t* sums) {
  Tile<M> sum;
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    for (int b = 0; b < kBlocks; ++b) {
      sum[b][m] = fresh ? zero() : _mm512_load_si512(sums + m * 64 + 16 * b);
    }
  }
  dot<M>(codes, q, q_stride, n_steps, next, sum);
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m) {
    for (int b = 0; b < kBlocks; ++b) _mm512_store_si512(sums + m * 64 + 16 * b, sum[b][m]);
  }
}

// A stretch of unpacked codes against all tokens. Unpacking waits for memory and tiles do not, so
// the first tile fetches `next`, what the next stretch will be unpacked from: a line is 4 k.
inline void add_stretch(const Call& c, const uint8_t* codes, const uint8_t* next, int64_t k,
                        int64_t n_steps, bool fresh, int32_t* sums) {
  if (kManyRows > 0 && c.m >= kManyRows && n_steps % kManySteps == 0) {
    return add_many(codes, c.q(0) + k, c.x.q_stride, c.m, n_steps, next, fresh, sums);
  }
  for_each_tile<6>(c.m, [&]<int M>(int64_t first) {
    add_tile<M>(codes, c.q(first) + k, c.x.q_stride, n_steps, first == 0 ? next : codes, fresh,
                sums + first * 64);
  });
}

struct I2 {
  // The fields are masked in place and not shifted: accumulator f collects 4^f times its sum, the
  // arithmetic shift at the end is exact. 8 operations per 256 weights; 16 accumulators hide the
  // latency.
  static void one(const uint8_t* codes, const int8_t* q, int64_t steps, int64_t ahead,
                  int32_t* sums) {
    const __m512i mask[4] = {bytes(3), bytes(12), bytes(48), bytes(192)};
    __m512i field[kBlocks][4];
    for (int b = 0; b < kBlocks; ++b) {
      for (int f = 0; f < 4; ++f) field[b][f] = zero();
    }
    for (int64_t s = 0; s < steps; ++s, codes += kStep, q += 16) {
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        stream(codes + 64 * b, ahead);
        const __m512i v = load(codes + 64 * b);
#pragma GCC unroll 4
        for (int f = 0; f < 4; ++f) {
          field[b][f] =
              _mm512_dpbusd_epi32(field[b][f], _mm512_and_si512(v, mask[f]), broadcast4(q + 4 * f));
        }
      }
    }
    for (int b = 0; b < kBlocks; ++b) {
      const __m512i low = _mm512_add_epi32(field[b][0], _mm512_srai_epi32(field[b][1], 2));
      const __m512i high =
          _mm512_add_epi32(_mm512_srai_epi32(field[b][2], 4), _mm512_srai_epi32(field[b][3], 6));
      _mm512_store_si512(sums + 16 * b, _mm512_add_epi32(low, high));
    }
  }

  static void run(const Call& c) {
    alignas(64) int32_t sums[kChunk * 64];
    if (c.m == 1) {
      one(c.panel, c.q(0), c.w.cols / 16, c.w.ahead, sums);
    } else {
      alignas(64) uint8_t codes[kStretch * 64];
      for (int64_t k = 0; k < c.w.cols; k += kStretch) {
        const int64_t n = c.w.cols - k < kStretch ? c.w.cols - k : kStretch;
        for (int64_t j = 0; j < n; j += 16) {
          unpack_unit<2, 0, 16>(c.panel + (k + j) / 16 * kStep, codes + j * 64);
        }
        add_stretch(c, codes, c.panel + (k + n) / 16 * kStep, k, n / 4, k == 0, sums);
      }
    }
    finish_rows(c, sums);
  }
};

// Bytes with one scale a row: nothing to unpack.
struct W8 {
  // What the panel holds: filled up with weights of zero that meet activations of zero.
  static int64_t columns(const Call& c) { return c.w.panel_bytes / 64; }

  static void one(const uint8_t* codes, const int8_t* q, int64_t steps, int64_t ahead,
                  int32_t* sums) {
    __m512i even[kBlocks], odd[kBlocks];
    for (int b = 0; b < kBlocks; ++b) even[b] = odd[b] = zero();
    for (int64_t s = 0; s < steps; s += 2, codes += 2 * kStep, q += 8) {
      const __m512i a = broadcast4(q), next_a = broadcast4(q + 4);
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        stream(codes + 64 * b, ahead);
        stream(codes + kStep + 64 * b, ahead);
        add_dot(even[b], load(codes + 64 * b), a);
        add_dot(odd[b], load(codes + kStep + 64 * b), next_a);
      }
    }
    for (int b = 0; b < kBlocks; ++b) {
      _mm512_store_si512(sums + 16 * b, _mm512_add_epi32(even[b], odd[b]));
    }
  }

  static void run(const Call& c) {
    alignas(64) int32_t sums[kChunk * 64];
    if (c.m == 1) {
      one(c.panel, c.q(0), columns(c) / 4, c.w.ahead, sums);
    } else {
      const int64_t cols = columns(c);
      for (int64_t k = 0; k < cols; k += kStretch) {
        const int64_t n = cols - k < kStretch ? cols - k : kStretch;
        add_stretch(c, c.panel + k * 64, c.panel + (k + n) * 64, k, n / 4, k == 0, sums);
      }
    }
    finish_rows<128>(c, sums);
  }
};

struct T5 {
  // 14 operations per 320 weights: all fields in place as in i2. Two blocks at a time, a half of
  // the panel.
  static void one_half(const FiveTrits& five, const uint8_t* p, const int8_t* q, int64_t steps,
                       int64_t ahead, int32_t* sums) {
    const __m512i mask[4] = {bytes(3), bytes(12), bytes(48), bytes(192)};
    __m512i field[2][5];
    for (int b = 0; b < 2; ++b) {
      for (int f = 0; f < 5; ++f) field[b][f] = zero();
    }
    for (int64_t s = 0; s < steps; ++s, p += 128, q += 20) {
#pragma GCC unroll 2
      for (int b = 0; b < 2; ++b) {
        stream(p + 64 * b, ahead);
        const FiveTrits::Codes v = five.unpack(load(p + 64 * b));
#pragma GCC unroll 4
        for (int f = 0; f < 4; ++f) {
          field[b][f] = _mm512_dpbusd_epi32(field[b][f], _mm512_and_si512(v.fields, mask[f]),
                                            broadcast4(q + 4 * f));
        }
        field[b][4] = _mm512_dpbusd_epi32(field[b][4], v.last, broadcast4(q + 16));
      }
    }
    for (int b = 0; b < 2; ++b) {
      const __m512i low = _mm512_add_epi32(field[b][0], _mm512_srai_epi32(field[b][1], 2));
      const __m512i mid = _mm512_add_epi32(low, _mm512_srai_epi32(field[b][2], 4));
      const __m512i high = _mm512_add_epi32(field[b][3], field[b][4]);
      _mm512_store_si512(sums + 16 * b, _mm512_add_epi32(mid, _mm512_srai_epi32(high, 6)));
    }
  }

  static void unpack(const FiveTrits& five, const uint8_t* p, int64_t half_bytes, int64_t steps,
                     uint8_t* codes) {
    for (int64_t s = 0; s < steps; ++s, p += 128, codes += 5 * kStep) {
      for (int b = 0; b < kBlocks; ++b) {
        const FiveTrits::Codes v = five.unpack(load(p + b / 2 * half_bytes + b % 2 * 64));
        uint8_t* out = codes + 64 * b;
        _mm512_store_si512(out, masked<3>(v.fields));
        _mm512_store_si512(out + kStep, masked<3>(shift_down<2>(v.fields)));
        _mm512_store_si512(out + 2 * kStep, masked<3>(shift_down<4>(v.fields)));
        _mm512_store_si512(out + 3 * kStep, masked<3>(shift_down<6>(v.fields)));
        _mm512_store_si512(out + 4 * kStep, masked<3>(shift_down<6>(v.last)));
      }
    }
  }

  static void run(const Call& c) {
    const FiveTrits five;
    alignas(64) int32_t sums[kChunk * 64];
    const int64_t half_bytes = c.w.panel_bytes / 2, n_steps = half_bytes / 128;
    if (c.m == 1) {
      one_half(five, c.panel, c.q(0), n_steps, c.w.ahead, sums);
      one_half(five, c.panel + half_bytes, c.q(0), n_steps, c.w.ahead, sums + 32);
    } else {
      alignas(64) uint8_t codes[kStretch * 64];
      constexpr int64_t kSteps = kStretch / 20;
      for (int64_t s = 0; s < n_steps; s += kSteps) {
        const int64_t n = n_steps - s < kSteps ? n_steps - s : kSteps;
        unpack(five, c.panel + s * 128, half_bytes, n, codes);
        const uint8_t* next = c.panel + (s + n) * 128;  // of both halves, which lie far apart
        for (int64_t i = 0; i < n * 2; ++i) prefetch(next + half_bytes + i * 64);
        add_stretch(c, codes, next, s * 20, n * 5, s == 0, sums);
      }
    }
    finish_rows(c, sums);
  }
};

// ---- the grouped schemes: floats over blocks of 256 k ----

// Scheme::kSuper: the integer scale and min of group g of a unit that begins at p, as floats.
template <Form kForm>
struct Side {
  __m512 scale, min;

  Side(const uint8_t* p, int b, int g) {
    if constexpr (kForm.side == 64) {
      const __m512i both =
          _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p + 16 * b)));
      scale = _mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15)));
      min = _mm512_cvtepi32_ps(_mm512_srli_epi32(both, 4));
    } else if constexpr (kForm.has_min) {
      scale = load_u8(p + 16 * b);
      min = load_u8(p + 64 + 16 * b);
    } else {
      scale = load_i8(p + 64 * g + 16 * b);
    }
  }
};

// 256 k of a panel (or what is left of K): codes, and the scales of its groups as floats.
template <PanelKind kKind>
struct Stretch {
  static constexpr Form kForm = kForms[static_cast<int>(kKind)];
  static constexpr int kUnitBytes = kForm.side + kForm.unit * 8 * (kForm.low + kForm.high);
  static constexpr int kBlockBytes = kForm.head + kForm.block / kForm.unit * kUnitBytes;
  static constexpr bool kInPlace = kForm.low == 8;  // the codes are bytes already
  static constexpr int64_t kGroupStride = kInPlace ? kBlockBytes : kForm.group * 64;

  alignas(64) float scale[kSuper / 16][64], min[kSuper / 16][64];
  alignas(64) uint8_t unpacked[kInPlace ? 64 : kSuper * 64];
  const uint8_t* codes;
  const uint8_t* head;
  const uint8_t* next;  // what the next stretch will be unpacked from; null: fetched already

  // The part of it that is as many bytes as group g was unpacked from.
  const uint8_t* next_of(int64_t g) const {
    constexpr int kBytes = kBlockBytes * kForm.group / kForm.block, kSteps = kForm.group / 4;
    if (next == nullptr) return codes;
    const uint8_t* p = next + g * kBytes;
    for (int i = 64 * kSteps; i < kBytes; i += 64) prefetch(p + i);  // the steps fetch the others
    return p;
  }

  void unpack(const uint8_t* p, int64_t k) {
    head = p;
    codes = kInPlace ? p + kForm.head : unpacked;
    for (int64_t first = 0; first < k; first += kForm.block) {
      const uint8_t* block_head = p;
      if constexpr (kForm.scheme == Scheme::kGroup) {
        for (int b = 0; b < kBlocks; ++b) {
          _mm512_store_ps(&scale[first / 32][16 * b], load_f16(block_head + 32 * b));
          if constexpr (kForm.has_min) {
            _mm512_store_ps(&min[first / 32][16 * b], load_f16(block_head + 128 + 32 * b));
          }
        }
      }
      p += kForm.head;
      for (int j = 0; j < kForm.block; j += kForm.unit, p += kUnitBytes) {
        if constexpr (kForm.scheme == Scheme::kSuper) unpack_side(p, j / kForm.group);
        if constexpr (!kInPlace) {
          unpack_unit<kForm.low, kForm.high, kForm.unit>(p + kForm.side,
                                                         unpacked + (first + j) * 64);
        }
      }
    }
  }

  void unpack_side(const uint8_t* p, int first) {
    constexpr int kGroups = kForm.unit / kForm.group;
    for (int b = 0; b < kBlocks; ++b) {
      for (int g = 0; g < kGroups; ++g) {
        const Side<kForm> side(p, b, g);
        _mm512_store_ps(&scale[first + g][16 * b], side.scale);
        if constexpr (kForm.has_min) _mm512_store_ps(&min[first + g][16 * b], side.min);
      }
    }
  }
};

// What M tokens bring to the groups of a stretch, side by side: a dozen row pointers would cost the
// tile vector registers.
template <int M, int kGroups>
struct Factors {
  float scale[kGroups][M];
  int32_t sum[kGroups][M];    // of q
  int32_t start[kGroups][M];  // what stands for the offset of the codes
};

// Integer sums of group g, and what came of them as floats.
template <PanelKind kKind, int M, class F>
inline void dot_group(const Call& c, const Stretch<kKind>& w, int64_t first, int64_t k, int64_t g,
                      const F& factors, Tile<M>& sum) {
  constexpr Form kForm = kForms[static_cast<int>(kKind)];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    const __m512i start = kForm.offset == 0 ? zero() : _mm512_set1_epi32(factors.start[g][m]);
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) sum[b][m] = start;
  }
  dot<M>(w.codes + g * Stretch<kKind>::kGroupStride, c.q(first) + k + g * kForm.group, c.x.q_stride,
         kForm.group / 4, w.next_of(g), sum);
}

// Scheme::kGroup: total += over the n groups of 32 of a stretch that begins at k
template <PanelKind kKind, int M>
inline void add_groups(const Call& c, const Stretch<kKind>& w, int64_t first, int64_t k, int64_t n,
                       Floats<M>& total) {
  constexpr Form kForm = kForms[static_cast<int>(kKind)];
  Factors<M, kSuper / 32> factors;
  for (int m = 0; m < M; ++m) {
    const float* scales = c.scales(first + m) + k / 32;
    const int32_t* sums = c.sums(first + m) + k / 32;
    for (int64_t g = 0; g < n; ++g) {
      factors.scale[g][m] = scales[g];
      factors.sum[g][m] = sums[g];
      factors.start[g][m] = -kForm.offset * sums[g];
    }
  }
  for (int64_t g = 0; g < n; ++g) {
    Tile<M> sum;
    dot_group<kKind, M>(c, w, first, k, g, factors, sum);
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const __m512 s_w = _mm512_load_ps(&w.scale[g][16 * b]);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const __m512 scale = _mm512_mul_ps(s_w, _mm512_set1_ps(factors.scale[g][m]));
        total[b][m] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sum[b][m]), total[b][m]);
      }
      if constexpr (kForm.has_min) {
        const __m512 min_w = _mm512_load_ps(&w.min[g][16 * b]);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const __m512 min = _mm512_mul_ps(min_w, _mm512_set1_ps(factors.scale[g][m]));
          const auto sum_x = static_cast<float>(factors.sum[g][m]);
          total[b][m] = _mm512_fmadd_ps(min, _mm512_set1_ps(sum_x), total[b][m]);
        }
      }
    }
  }
}

// Scheme::kSuper: total += of the 256 k block j
template <PanelKind kKind, int M>
inline void add_super(const Call& c, const Stretch<kKind>& w, int64_t first, int64_t j,
                      Floats<M>& total) {
  constexpr Form kForm = kForms[static_cast<int>(kKind)];
  constexpr int kGroups = kSuper / kForm.group;
  Factors<M, kGroups> factors;
  for (int m = 0; m < M; ++m) {
    for (int g = 0; g < kGroups; ++g) {
      factors.sum[g][m] = group_sum<kForm>(c.sums(first + m) + j * 16, g);
      factors.start[g][m] = -kForm.offset * factors.sum[g][m];
    }
  }
  Floats<M> part;
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) part[b][m] = _mm512_setzero_ps();
  }
  for (int g = 0; g < kGroups; ++g) {
    Tile<M> sum;
    dot_group<kKind, M>(c, w, first, j * kSuper, g, factors, sum);
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const __m512 scale = _mm512_load_ps(&w.scale[g][16 * b]);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        part[b][m] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sum[b][m]), part[b][m]);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    const __m512 s_x = _mm512_set1_ps(c.scales(first + m)[j]);
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const __m512 d = _mm512_mul_ps(load_f16(w.head + 32 * b), s_x);
      total[b][m] = _mm512_fmadd_ps(d, part[b][m], total[b][m]);
    }
    if constexpr (kForm.has_min) {
      __m512 mins[kBlocks];
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) mins[b] = _mm512_setzero_ps();
      for (int g = 0; g < kGroups; ++g) {
        const __m512 sum_x = _mm512_set1_ps(static_cast<float>(factors.sum[g][m]));
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) {
          mins[b] = _mm512_fmadd_ps(_mm512_load_ps(&w.min[g][16 * b]), sum_x, mins[b]);
        }
      }
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        const __m512 dmin = _mm512_mul_ps(load_f16(w.head + 128 + 32 * b), s_x);
        total[b][m] = _mm512_fnmadd_ps(dmin, mins[b], total[b][m]);
      }
    }
  }
}

// One row of x: codes go from registers into the sums, nothing is stored. A block at a time, so
// that loads of the next one overlap with the arithmetic of this one.
template <PanelKind kKind>
inline void one_row(const Call& c) {
  using W = Stretch<kKind>;
  constexpr Form kForm = W::kForm;
  constexpr int kGroups = kForm.unit / kForm.group;
  __m512 total[kBlocks];
  for (int b = 0; b < kBlocks; ++b) total[b] = _mm512_setzero_ps();
  const uint8_t* p = c.panel;
  for (int64_t k = 0; k < c.w.cols; k += kForm.block) {
    const uint8_t* head = p;
    const float s_x = c.scales(0)[k / kForm.grain];
    const int32_t* sums = c.sums(0) + (kForm.scheme == Scheme::kGroup ? k / 32 : k / kSuper * 16);
    __m512 part[kBlocks], mins[kBlocks];
    for (int b = 0; b < kBlocks; ++b) part[b] = mins[b] = _mm512_setzero_ps();
    p += kForm.head;
    for (int j = 0; j < kForm.block; j += kForm.unit, p += W::kUnitBytes) {
      for (int i = 0; i < W::kUnitBytes; i += 64) stream(p + i, c.w.ahead);
      const int8_t* q = c.q(0) + k + j;
      int32_t sum_x[kGroups];
      for (int g = 0; g < kGroups; ++g) {
        sum_x[g] = group_sum<kForm>(sums, j / kForm.group + g);
      }
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        __m512i sum[kGroups];
        for (int g = 0; g < kGroups; ++g) sum[g] = _mm512_set1_epi32(-kForm.offset * sum_x[g]);
        for_each_code<kForm.low, kForm.high, kForm.unit>(
            p + kForm.side, b, [&]<int kIndex>(__m512i code) {
              __m512i& to = sum[kIndex / (kForm.group / 4)];
              to = _mm512_dpbusd_epi32(to, code, broadcast4(q + 4 * kIndex));
            });
        if constexpr (kForm.scheme == Scheme::kGroup) {
          const __m512 scale = _mm512_mul_ps(load_f16(head + 32 * b), _mm512_set1_ps(s_x));
          total[b] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sum[0]), total[b]);
          if constexpr (kForm.has_min) {
            const __m512 min = _mm512_mul_ps(load_f16(head + 128 + 32 * b), _mm512_set1_ps(s_x));
            const auto x = static_cast<float>(sum_x[0]);
            total[b] = _mm512_fmadd_ps(min, _mm512_set1_ps(x), total[b]);
          }
        } else {
          for (int g = 0; g < kGroups; ++g) {
            const Side<kForm> side(p, b, g);
            part[b] = _mm512_fmadd_ps(side.scale, _mm512_cvtepi32_ps(sum[g]), part[b]);
            if constexpr (kForm.has_min) {
              const auto x = static_cast<float>(sum_x[g]);
              mins[b] = _mm512_fmadd_ps(side.min, _mm512_set1_ps(x), mins[b]);
            }
          }
        }
      }
    }
    if constexpr (kForm.scheme == Scheme::kSuper) {
      for (int b = 0; b < kBlocks; ++b) {
        const __m512 d = _mm512_mul_ps(load_f16(head + 32 * b), _mm512_set1_ps(s_x));
        total[b] = _mm512_fmadd_ps(d, part[b], total[b]);
        if constexpr (kForm.has_min) {
          const __m512 dmin = _mm512_mul_ps(load_f16(head + 128 + 32 * b), _mm512_set1_ps(s_x));
          total[b] = _mm512_fnmadd_ps(dmin, mins[b], total[b]);
        }
      }
    }
  }
  for (int b = 0; b < kBlocks; ++b) c.store(0, b, total[b]);
}

// Unpacked codes against M tokens from `first` on: totals [M][64] are added to, or made at k = 0.
template <PanelKind kKind, int M>
__attribute__((noinline)) void add_float_tile(const Call& c, const Stretch<kKind>& w, int64_t first,
                                              int64_t k, int64_t n, float* totals) {
  Floats<M> total;
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      total[b][m] = k == 0 ? _mm512_setzero_ps() : _mm512_load_ps(totals + m * 64 + 16 * b);
    }
  }
  if constexpr (Stretch<kKind>::kForm.scheme == Scheme::kGroup) {
    add_groups<kKind, M>(c, w, first, k, n / 32, total);
  } else {
    add_super<kKind, M>(c, w, first, k / kSuper, total);
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) _mm512_store_ps(totals + m * 64 + 16 * b, total[b][m]);
  }
}

template <PanelKind kKind>
struct Grouped {
  static void run(const Call& c) {
    if (c.m == 1) return one_row<kKind>(c);
    using W = Stretch<kKind>;
    constexpr int kTokens = 3;  // 12 registers of integer sums, 12 of floats
    alignas(64) float totals[kChunk * 64];
    W w;
    for (int64_t k = 0; k < c.w.cols; k += kSuper) {
      const int64_t n = c.w.cols - k < kSuper ? c.w.cols - k : kSuper;
      w.unpack(c.panel + k / W::kForm.block * W::kBlockBytes, n);
      w.next = c.panel + (k + n) / W::kForm.block * W::kBlockBytes;
      for_each_tile<kTokens>(c.m, [&]<int M>(int64_t first) {
        add_float_tile<kKind, M>(c, w, first, k, n, totals + first * 64);
        w.next = nullptr;
      });
    }
    for (int64_t token = 0; token < c.m; ++token) {
      for (int b = 0; b < kBlocks; ++b) {
        c.store(token, b, _mm512_load_ps(totals + token * 64 + 16 * b));
      }
    }
  }
};

// Ternary with one f32 scale per 256: the sums of a stretch are rows' sums, cut at 256.
struct I2Blocks {
  static void run(const Call& c) {
    constexpr int64_t kBlockBytes = 256 + kSuper * 16;
    alignas(64) float totals[kChunk * 64];
    alignas(64) int32_t sums[kChunk * 64];
    alignas(64) uint8_t codes[kSuper * 64];
    for (int64_t j = 0; j < c.w.cols / kSuper; ++j) {
      const uint8_t* p = c.panel + j * kBlockBytes;
      if (c.m == 1) {
        I2::one(p + 256, c.q(0) + j * kSuper, 16, c.w.ahead, sums);
      } else {
        for (int u = 0; u < 16; ++u) unpack_unit<2, 0, 16>(p + 256 + u * kStep, codes + u * 1024);
        add_stretch(c, codes, p + kBlockBytes, j * kSuper, kSuper / 4, true, sums);
      }
      for (int64_t token = 0; token < c.m; ++token) {
        const __m512i offset = _mm512_set1_epi32(c.sums(token)[j]);
        for (int b = 0; b < kBlocks; ++b) {
          float* out = totals + token * 64 + 16 * b;
          const __m512i trits =
              _mm512_sub_epi32(_mm512_load_si512(sums + token * 64 + 16 * b), offset);
          const __m512 scale = _mm512_load_ps(reinterpret_cast<const float*>(p) + 16 * b);
          const __m512 before = j == 0 ? _mm512_setzero_ps() : _mm512_load_ps(out);
          _mm512_store_ps(out, _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(trits), before));
        }
      }
    }
    for (int64_t token = 0; token < c.m; ++token) {
      const __m512 s_x = _mm512_set1_ps(c.scales(token)[0]);
      for (int b = 0; b < kBlocks; ++b) {
        c.store(token, b, _mm512_mul_ps(_mm512_load_ps(totals + token * 64 + 16 * b), s_x));
      }
    }
  }
};

// ---- floats: one chain of fma per row, in k order ----

inline __m512 widen(const float* p) { return _mm512_load_ps(p); }

inline __m512 widen(const F16* p) { return load_f16(reinterpret_cast<const uint8_t*>(p)); }

inline __m512 widen(const BF16* p) {
  const __m256i h = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

template <class Value>
struct Float {
  static void run(const Call& c) {
    for_each_tile<6>(c.m, [&]<int M>(int64_t first) {
      Floats<M> total;
      for (int b = 0; b < kBlocks; ++b) {
        for (int m = 0; m < M; ++m) total[b][m] = _mm512_setzero_ps();
      }
      const float* x = c.x.x + (c.i + first) * c.x.x_stride;
      const auto* p = reinterpret_cast<const Value*>(c.panel);
      for (int64_t k = 0; k < c.w.cols; ++k, p += kPanelRows) {
        __m512 v[kBlocks];
        for (int b = 0; b < kBlocks; ++b) v[b] = widen(p + 16 * b);
        for (int m = 0; m < M; ++m) {
          const __m512 a = _mm512_set1_ps(x[m * c.x.x_stride + k]);
          for (int b = 0; b < kBlocks; ++b) total[b][m] = _mm512_fmadd_ps(v[b], a, total[b][m]);
        }
      }
      for (int m = 0; m < M; ++m) {
        for (int b = 0; b < kBlocks; ++b) c.store(first + m, b, total[b][m]);
      }
    });
  }
};

// ---- bf16 times bf16 ----

// A step is 2 k: the products are those of f32, in k order, so the bits are those of `ref`.
struct BF16Dot {
  static __m512 low(__m512i pair) { return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)); }
  static __m512 high(__m512i pair) {
    return _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(-65536)));
  }

  static void run(const Call& c) {
    for_each_tile<4>(c.m, [&]<int M>(int64_t first) {
      Floats<M> total;
      for (int b = 0; b < kBlocks; ++b) {
        for (int m = 0; m < M; ++m) total[b][m] = _mm512_setzero_ps();
      }
      const uint16_t* x = c.x.bf16 + (c.i + first) * c.x.bf16_stride;
      const uint8_t* p = c.panel;
      for (int64_t k = 0; k < c.w.cols; k += 2, p += kStep) {
        __m512i v[kBlocks];
        for (int b = 0; b < kBlocks; ++b) {
          if (first == 0) stream(p + 64 * b, c.w.ahead);
          v[b] = load(p + 64 * b);
        }
        for (int m = 0; m < M; ++m) {
          const __m512i a = broadcast_pair(x + m * c.x.bf16_stride + k);
          for (int b = 0; b < kBlocks; ++b) {
            total[b][m] = _mm512_fmadd_ps(low(v[b]), low(a), total[b][m]);
            total[b][m] = _mm512_fmadd_ps(high(v[b]), high(a), total[b][m]);
          }
        }
      }
      for (int m = 0; m < M; ++m) {
        for (int b = 0; b < kBlocks; ++b) c.store(first + m, b, total[b][m]);
      }
    });
  }
};

}  // namespace
}  // namespace nearfar
