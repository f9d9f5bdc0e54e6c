// The body of ops_{ref,avx2,avx512,amx,neon}.cc: included once by each, after it has defined in an
// anonymous namespace
//   kWidth            floats of a vector register (4, 8 or 16)
//   half_to_float     const uint16_t* -> Vec, kWidth numbers
//   byte_to_float     const int8_t* -> Vec, kWidth numbers; not __builtin_convertvector, of which
//                     GCC 12 makes scalar code
//   float_to_half     Vec -> uint16_t*
// Vectors are the compiler's own (GCC and clang): element-wise + - * / and ?: are exact on every
// ISA.  Only builtins here: an inline function of the standard library, compiled for AVX-512, could
// replace the portable one at link time.
//
// Registers of the two attention loops: kQueries x (kBlock / kWidth) accumulators would not fit, so
// both hold kQueries x kColumns vectors of results (16 of 32 zmm, 8 of 16 ymm, 8 of 32 NEON q),
// load kColumns and broadcast kQueries a step.

#include "check.h"
#include "ops.h"

namespace nearfar {
namespace {

constexpr int kLanes = 16;  // partial sums of every reduction, whatever the register width
constexpr int kRegisters = kLanes / kWidth;
constexpr int kColumns = kWidth == 16 ? 4 : 2;
constexpr int kQueries = 4;  // of one pass over a block

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline Vec load(const uint16_t* p) { return half_to_float(p); }
inline Vec load(const int8_t* p) { return byte_to_float(p); }
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
inline Vec splat(float x) { return x - Vec{}; }  // x - 0 is x, whatever its sign
inline Vec at_least(Vec x, float low) { return x < splat(low) ? splat(low) : x; }  // NaN stays
inline Vec at_most(Vec x, float high) { return x > splat(high) ? splat(high) : x; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// e^x with a relative error under 3e-7, x clamped to [-87, 88]; NaN stays.  Range reduction by n ln
// 2 in two parts, polynomial of degree 7 on [-ln2/2, ln2/2] (Cephes, expf).
inline Vec exponential(Vec x) {
  x = at_most(at_least(x, -87.0f), 88.0f);
  const Vec magic = splat(0x1.8p23f);  // adding and subtracting it rounds to a whole number
  const Vec n = (x * 1.44269504088896341f + magic) - magic;
  const Vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const IntVec bits = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return p * power;
}

// Adds 16 lanes in a fixed tree.
inline float sum_lanes(const Vec (&sum)[kRegisters]) {
  float lane[kLanes];
  __builtin_memcpy(lane, &sum, sizeof(lane));
  for (int n = kLanes / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  }
  return lane[0];
}

// Calls step(register, offset, a vector of x) for all of x[0, n); the last lanes are filled up with
// zeros.
template <typename Step>
inline void for_lanes(const float* x, int64_t n, Step step) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int r = 0; r < kRegisters; ++r) step(r, load(x + i + r * kWidth));
  }
  if (i < n) {
    float rest[kLanes] = {};
    __builtin_memcpy(rest, x + i, (n - i) * sizeof(float));
    for (int r = 0; r < kRegisters; ++r) step(r, load(rest + r * kWidth));
  }
}

// y[i] = f(a[i], b[i]); the tail goes through a padded register, so that all elements take the same
// path.
template <typename F>
inline void map(const float* a, const float* b, int64_t n, float* y, F f) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(y + i, f(load(a + i), load(b + i)));
  if (i < n) {
    float rest_a[kWidth] = {}, rest_b[kWidth] = {}, rest_y[kWidth];
    __builtin_memcpy(rest_a, a + i, (n - i) * sizeof(float));
    __builtin_memcpy(rest_b, b + i, (n - i) * sizeof(float));
    store(rest_y, f(load(rest_a), load(rest_b)));
    __builtin_memcpy(y + i, rest_y, (n - i) * sizeof(float));
  }
}

void rms_norm(const float* x, const float* gain, int64_t n, float eps, float* y) {
  Vec squares[kRegisters] = {};
  for_lanes(x, n, [&](int r, Vec v) { squares[r] += v * v; });
  const float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(n) + eps);
  map(x, gain, n, y, [scale](Vec v, Vec g) { return v * scale * g; });
}

void silu_mul(const float* gate, const float* up, int64_t n, float* y) {
  map(gate, up, n, y, [](Vec g, Vec u) { return g / (1.0f + exponential(-g)) * u; });
}

void relu2_mul(const float* gate, const float* up, int64_t n, float* y) {
  map(gate, up, n, y, [](Vec g, Vec u) {
    const Vec positive = at_least(g, 0.0f);
    return positive * positive * u;
  });
}

void add(const float* x, int64_t n, float* y) {
  map(x, y, n, y, [](Vec a, Vec b) { return b + a; });
}

// Plain loops, of which compilers make vectors.
inline int32_t bits_of(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// Integers compare like the floats here, and no float is reordered.
uint32_t max_magnitude(const float* x, int64_t n) {
  int32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t magnitude = bits_of(x[i]) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  return static_cast<uint32_t>(most);
}

int64_t largest(const float* x, int64_t n) {
  if (max_magnitude(x, n) >= 0x7f800000u) return -1;
  int32_t most = -0x7fffffff;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t bits = bits_of(x[i]), key = bits ^ ((bits >> 31) & 0x7fffffff);
    most = key > most ? key : most;
  }
  most ^= (most >> 31) & 0x7fffffff;
  float value;
  __builtin_memcpy(&value, &most, sizeof(value));
  int64_t i = 0;
  while (x[i] != value) ++i;
  return i;
}

// |x * inverse| <= 127 (1 + 2^-23): adding 1.5 * 2^23 leaves the integer, rounded to nearest even,
// in the low bits of the sum, and it is never beyond 127.
void to_int8(const float* x, int64_t n, float inverse, int8_t* q) {
  constexpr float kRound = 12582912.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float rounded = x[i] * inverse + kRound;
    q[i] = static_cast<int8_t>(bits_of(rounded) - 0x4b400000);
  }
}

void sum_runs(const int8_t* q, int64_t n, int64_t run, int32_t* sums) {
  for (int64_t first = 0; first < n; first += run) {
    const int64_t end = first + run < n ? first + run : n;
    int32_t sum = 0;
    for (int64_t k = first; k < end; ++k) sum += q[k];
    *sums++ = sum;
  }
}

// As f32_to_bf16 in half.h.
void to_bf16(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = static_cast<uint32_t>(bits_of(x[i]));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40u;
    y[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }
}

void to_half(const float* x, int64_t n, uint16_t* y) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) float_to_half(load(x + i), y + i);
  if (i < n) {
    float rest[kWidth] = {};
    uint16_t half[kWidth];
    __builtin_memcpy(rest, x + i, (n - i) * sizeof(float));
    float_to_half(load(rest), half);
    __builtin_memcpy(y + i, half, (n - i) * sizeof(uint16_t));
  }
}

void from_half(const uint16_t* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(y + i, half_to_float(x + i));
  if (i < n) {
    uint16_t rest[kWidth] = {};
    float wide[kWidth];
    __builtin_memcpy(rest, x + i, (n - i) * sizeof(uint16_t));
    store(wide, half_to_float(rest));
    __builtin_memcpy(y + i, wide, (n - i) * sizeof(float));
  }
}

// Asks for the memory kAhead behind [p, p + n): the hardware's own prefetch starts anew on every
// page and comes late.  Past the end of the block this is the next head or nothing, and harmless.
constexpr int64_t kAhead = 2048, kLine = 64;
inline void fetch_ahead(const void* p, int64_t n) {
  for (int64_t i = 0; i < n; i += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kAhead + i));
  }
}

constexpr bool is_coded(const int8_t*) { return true; }
constexpr bool is_coded(const void*) { return false; }

// scores[i][j] = sum_d q[i][d] * k[d][j], d rising, for N queries and all 64 positions.
template <int N, typename Number>
inline void score(const AttendBlock<Number>& a, const float* q, float* scores) {
  for (int64_t j = 0; j < kBlock; j += kColumns * kWidth) {
    Vec sum[N][kColumns] = {};
    for (int64_t group = 0; group < a.head_dim; group += kInt8Group) {
      Vec scale[kColumns] = {};
      for (int c = 0; is_coded(a.k) && c < kColumns; ++c) {
        scale[c] = load(a.k_scales + group / kInt8Group * kBlock + j + c * kWidth);
      }
      const int64_t end = group + kInt8Group < a.head_dim ? group + kInt8Group : a.head_dim;
      for (int64_t d = group; d < end; ++d) {
        if (j == 0) fetch_ahead(a.k + d * kBlock, kBlock * sizeof(Number));
        Vec key[kColumns];
        for (int c = 0; c < kColumns; ++c) {
          key[c] = load(a.k + d * kBlock + j + c * kWidth);
          if (is_coded(a.k)) key[c] *= scale[c];
        }
        for (int i = 0; i < N; ++i) {
          const float query = q[i * a.head_dim + d];
          for (int c = 0; c < kColumns; ++c) sum[i][c] += key[c] * query;
        }
      }
    }
    for (int i = 0; i < N; ++i) {
      for (int c = 0; c < kColumns; ++c) store(scores + i * kBlock + j + c * kWidth, sum[i][c]);
    }
  }
}

// e^x for x <= 0, and 0 where its products with values could be denormal numbers, which are slow.
inline Vec weight(Vec x) { return x < splat(-80.0f) ? Vec{} : exponential(x); }

// Turns a query's scores into exp(score - max), 0 where not visible; updates max and sum; scales
// `out` to the new max.
inline void soften(float* scores, const int64_t* visible, float scale, int64_t head_dim, float& max,
                   float& sum, float* out) {
  constexpr float kNothing = -__builtin_inff();
  IntVec lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  const auto seen = [&](int64_t j) {
    return (lane >= static_cast<int>(visible[0] - j)) & (lane < static_cast<int>(visible[1] - j));
  };

  Vec top = splat(kNothing);
  for (int64_t j = 0; j < kBlock; j += kWidth) {
    const Vec s = seen(j) ? load(scores + j) * scale : splat(kNothing);
    store(scores + j, s);
    top = larger(s, top);
  }
  float new_max = max;
  for (int i = 0; i < kWidth; ++i) new_max = top[i] > new_max ? top[i] : new_max;

  Vec sums[kRegisters] = {};
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    for (int r = 0; r < kRegisters; ++r) {
      float* s = scores + j + r * kWidth;
      const Vec p = seen(j + r * kWidth) ? weight(load(s) - new_max) : Vec{};
      store(s, p);
      sums[r] += p;
    }
  }
  const Vec correction = weight(splat(max - new_max));  // at the start max is -inf
  sum = sum * correction[0] + sum_lanes(sums);
  max = new_max;
  for (int64_t d = 0; d < head_dim; d += kWidth) store(out + d, load(out + d) * correction);
}

// out[i][d] += sum_j p[i][j] * v[j][d] for j in [first, last) and N queries, kColumns vectors of d
// at a time.
template <int N, int Columns, typename Number>
inline void accumulate(const AttendBlock<Number>& a, const float* p, int64_t d, int64_t first,
                       int64_t last, float* out) {
  const int64_t head_dim = a.head_dim, n_groups = int8_groups(head_dim);
  Vec sum[N][Columns];
  for (int i = 0; i < N; ++i) {
    for (int c = 0; c < Columns; ++c) sum[i][c] = load(out + i * head_dim + d + c * kWidth);
  }
  for (int64_t j = first; j < last; ++j) {
    if (d == 0) fetch_ahead(a.v + j * head_dim, head_dim * sizeof(Number));
    Vec value[Columns];
    for (int c = 0; c < Columns; ++c) {
      value[c] = load(a.v + j * head_dim + d + c * kWidth);
      if (is_coded(a.v)) value[c] *= a.v_scales[j * n_groups + (d + c * kWidth) / kInt8Group];
    }
    for (int i = 0; i < N; ++i) {
      const float weight = p[i * kBlock + j];
      for (int c = 0; c < Columns; ++c) sum[i][c] += value[c] * weight;
    }
  }
  for (int i = 0; i < N; ++i) {
    for (int c = 0; c < Columns; ++c) store(out + i * head_dim + d + c * kWidth, sum[i][c]);
  }
}

template <int N, typename Number>
inline void add_values(const AttendBlock<Number>& a, const float* p, int64_t first, int64_t last,
                       float* out) {
  int64_t d = 0;
  for (; d + kColumns * kWidth <= a.head_dim; d += kColumns * kWidth) {
    accumulate<N, kColumns>(a, p, d, first, last, out);
  }
  for (; d < a.head_dim; d += kWidth) accumulate<N, 1>(a, p, d, first, last, out);
}

// N queries from `i` on.
template <int N, typename Number>
inline void attend_queries(const AttendBlock<Number>& a, int64_t i) {
  const int64_t hd = a.head_dim;
  float* scores = a.scores + i * kBlock;
  float* out = a.out + i * hd;
  score<N>(a, a.q + i * hd, scores);
  int64_t begin = 0, end = kBlock;  // positions that all N see
  for (int n = 0; n < N; ++n) {
    const int64_t* visible = a.visible + 2 * (i + n);
    NF_DCHECK(visible[0] >= 0 && visible[1] <= kBlock);
    // A query that sees nothing here keeps its state as it is.
    if (visible[0] < visible[1]) {
      soften(scores + n * kBlock, visible, a.scale, hd, a.max[i + n], a.sum[i + n], out + n * hd);
    }
    begin = visible[0] > begin ? visible[0] : begin;
    end = visible[1] < end ? visible[1] : end;
  }
  if (begin > end) begin = end;
  // What lies before and behind these goes one by one, and in order: values that a query does not
  // see must not touch it, not even multiplied by zero.
  const auto add_own = [&](int n, int64_t first, int64_t last) {
    first = a.visible[2 * (i + n)] > first ? a.visible[2 * (i + n)] : first;
    last = a.visible[2 * (i + n) + 1] < last ? a.visible[2 * (i + n) + 1] : last;
    if (first < last) add_values<1>(a, scores + n * kBlock, first, last, out + n * hd);
  };
  for (int n = 0; n < N; ++n) add_own(n, 0, begin);
  add_values<N>(a, scores, begin, end, out);
  for (int n = 0; n < N; ++n) add_own(n, end, kBlock);
}

template <typename Number>
void attend(const AttendBlock<Number>& a) {
  NF_DCHECK(a.head_dim % kLanes == 0);
  int64_t i = 0;
  for (; i + kQueries <= a.n_queries; i += kQueries) attend_queries<kQueries>(a, i);
  switch (a.n_queries - i) {
    case 3:
      return attend_queries<3>(a, i);
    case 2:
      return attend_queries<2>(a, i);
    case 1:
      return attend_queries<1>(a, i);
    default:
      return;
  }
}

void from_int8(const AttendBlock<int8_t>& a, float* k, float* v) {
  const int64_t n_groups = int8_groups(a.head_dim);
  for (int64_t d = 0; d < a.head_dim; ++d) {
    const float* scales = a.k_scales + d / kInt8Group * kBlock;
    for (int64_t j = 0; j < kBlock; j += kWidth) {
      store(k + d * kBlock + j, load(a.k + d * kBlock + j) * load(scales + j));
    }
  }
  for (int64_t j = 0; j < kBlock; ++j) {
    for (int64_t d = 0; d < a.head_dim; d += kWidth) {
      const float scale = a.v_scales[j * n_groups + d / kInt8Group];
      store(v + j * a.head_dim + d, load(a.v + j * a.head_dim + d) * scale);
    }
  }
}

inline uint16_t bf16_of(float x) {  // finite, or the plain NaN
  const auto bits = static_cast<uint32_t>(bits_of(x));
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

void keys_from_codes(const int8_t* k, const float* scales, int64_t head_dim, uint16_t* y) {
  float both[2 * kBlock];
  for (int64_t j = 0; j < kBlock; ++j) both[2 * j] = both[2 * j + 1] = scales[j];
  for (int64_t d = 0; d < head_dim / 2; ++d, k += 2 * kBlock, y += 2 * kBlock) {
    for (int64_t i = 0; i < 2 * kBlock; ++i) y[i] = bf16_of(static_cast<float>(k[i]) * both[i]);
  }
}

void values_from_codes(const int8_t* v, const float* scales, int64_t head_dim, uint16_t* y) {
  for (int64_t j = 0; j < kBlock; j += 2, v += 2 * head_dim, y += 2 * head_dim) {
    for (int64_t d = 0; d < head_dim; ++d) {
      y[2 * d] = bf16_of(static_cast<float>(v[2 * d]) * scales[j]);
      y[2 * d + 1] = bf16_of(static_cast<float>(v[2 * d + 1]) * scales[j + 1]);
    }
  }
}

void from_pairs(const uint16_t* x, int64_t n, int64_t width, float* y) {
  for (int64_t i = 0; i < n; i += 2) {
    float* even = y + i * width;
    float* odd = even + width;
    for (int64_t c = 0; c < width; ++c, x += 2) {
      uint32_t pair;
      __builtin_memcpy(&pair, x, sizeof(pair));
      const uint32_t low = pair << 16, high = pair & 0xffff0000u;
      __builtin_memcpy(even + c, &low, sizeof(low));
      __builtin_memcpy(odd + c, &high, sizeof(high));
    }
  }
}

constexpr Ops kTable = {rms_norm,          silu_mul,       relu2_mul, add,
                        largest,           max_magnitude,  to_int8,   sum_runs,
                        to_bf16,           to_half,        from_half, attend<float>,
                        attend<uint16_t>,  attend<int8_t>, nullptr,   keys_from_codes,
                        values_from_codes, from_pairs,     from_int8};

}  // namespace
}  // namespace nearfar
