// Everything between the matrix products: norms, activations, rotation, and the steps of attention.
//
// `Ops` is compiled once per ISA from one source (ops_body.h).  No fused multiply-add and sums over
// 16 fixed lanes, so that every ISA gives the same bits.
#pragma once

#include <cstdint>

namespace nearfar {

constexpr int64_t kBlock = 64;      // positions of a KV block
constexpr int64_t kFewQueries = 8;  // that attention handles without converting a block first
constexpr int64_t kInt8Group = 32;  // int8 numbers of a head that share a scale

constexpr int64_t int8_groups(int64_t head_dim) { return (head_dim + kInt8Group - 1) / kInt8Group; }

// One step of attention: all queries that share a KV head, against one block of keys and values in
// f32, f16 (uint16_t) or int8 with scales.
template <typename Number>
struct AttendBlock {
  int64_t n_queries;       // rows of the call times heads that share the KV head
  int64_t head_dim;        // numbers of a head, a multiple of 16 (padded with zeros)
  const float* q;          // [n_queries, head_dim]
  const Number* k;         // [head_dim, kBlock]: a lane is a position
  const Number* v;         // [kBlock, head_dim]
  const float* k_scales;   // [int8_groups, kBlock], int8 only
  const float* v_scales;   // [kBlock, int8_groups], int8 only
  const int64_t* visible;  // [n_queries, 2]: each sees positions [first, last) of the block
  float scale;             // multiplies the scores
  float* scores;           // [n_queries, kBlock] scratch
  float* max;              // [n_queries] running maximum, -inf at the start
  float* sum;              // [n_queries] running sum of exp(score - max), 0 at the start
  float* out;  // [n_queries, head_dim] running sum of exp(score - max) * v, 0 at the start
};

// The same for bf16, whose numbers lie in pairs along what a product adds up over.
//   k: [head_dim / 2, kBlock, 2]      v: [kBlock / 2, head_dim, 2]
// Every value of the block is finite: what a query does not see is multiplied by zero. A key may be
// not a number, which those who see it become.
struct AttendPairs {
  int64_t n_queries, head_dim;  // head_dim: a multiple of 32
  const uint16_t *q, *k, *v;    // q: [n_queries, head_dim], bf16
  const int64_t* visible;
  float scale;
  float *scores, *max, *sum, *out;
};

struct Ops {
  // y[i] = x[i] / sqrt(mean(x^2) + eps) * gain[i].  y may be x.  RMSNorm, 1910.07467 eq. 4.
  void (*rms_norm)(const float* x, const float* gain, int64_t n, float eps, float* y);
  // y[i] = silu(gate[i]) * up[i].  y may be an input.
  void (*silu_mul)(const float* gate, const float* up, int64_t n, float* y);
  // y[i] = max(gate[i], 0)^2 * up[i].  y may be an input.
  void (*relu2_mul)(const float* gate, const float* up, int64_t n, float* y);
  // y[i] += x[i]
  void (*add)(const float* x, int64_t n, float* y);
  // Where the largest number of x is, the first of equals; -1 if not all are finite.  n >= 1.
  int64_t (*largest)(const float* x, int64_t n);
  // The largest |x| as its bits; above those of infinity: some x is not a number.
  uint32_t (*max_magnitude)(const float* x, int64_t n);
  // q[i] = rint(x[i] * inverse), where that is -127..127.
  void (*to_int8)(const float* x, int64_t n, float inverse, int8_t* q);
  // sums[j] of n / run runs of q, the last one may be shorter.
  void (*sum_runs)(const int8_t* q, int64_t n, int64_t run, int32_t* sums);
  void (*to_bf16)(const float* x, int64_t n, uint16_t* y);
  // Round to nearest even, and back.
  void (*to_half)(const float* x, int64_t n, uint16_t* y);
  void (*from_half)(const uint16_t* x, int64_t n, float* y);
  // Online softmax (2112.05682): a query's result depends on its own numbers and the order of the
  // blocks only.
  void (*attend_f32)(const AttendBlock<float>& block);
  // The same bits as converting the block first; pays off for few queries, up to kFewQueries.
  void (*attend_f16)(const AttendBlock<uint16_t>& block);
  void (*attend_int8)(const AttendBlock<int8_t>& block);
  // bf16 products added in f32: bits of its own, the same for a query whatever the others.  Null:
  // widen the block and attend in f32.
  void (*attend_pairs)(const AttendPairs& block);
  // Codes of a block in pairs times scales [kBlock] -> bf16 in pairs, rounded to nearest even.
  void (*keys_from_codes)(const int8_t* k, const float* scales, int64_t head_dim, uint16_t* y);
  void (*values_from_codes)(const int8_t* v, const float* scales, int64_t head_dim, uint16_t* y);
  // bf16 in pairs [n / 2, width, 2] -> f32 [n, width].  Exact.
  void (*from_pairs)(const uint16_t* x, int64_t n, int64_t width, float* y);
  // Codes times scales: k and v of a block, and k_scales and v_scales, as above -> f32.  Exact.
  void (*from_int8)(const AttendBlock<int8_t>& block, float* k, float* v);
};

// Reached through kernels().ops.
namespace ref {
extern const Ops kOps;
}
namespace avx2 {
extern const Ops kOps;
}
namespace avx512 {
extern const Ops kOps;
}
namespace amx {
extern const Ops kOps;
}
namespace neon {
extern const Ops kOps;
}

}  // namespace nearfar
