// The head by fewer bytes: requantised to 4.5 bits, or screened so that only rows which may hold
// the largest logit are multiplied as the file has them.
//
// Screening, for z = W x (what the head's kernel gives) and s = C c, the product of a copy C
// of W with its own input c: C has 8.5 bits for a head of floats, 4.5 bits for others. In exact
// arithmetic, by Cauchy-Schwarz, for each row v
//
//   |s_v - z_v| = |C_v (c - x) + (C_v - W_v) x| <= |C_v| |c - x| + |C_v - W_v| |x| = e_v
//
// and c = x where both kinds round their input alike (grain 32). Floats add the slack
//   g (|C_v| |c| + |W_v| |x|) + tiny,   g = n u / (1 - n u), n = cols + 16, u = 2^-24
// for n roundings along a row (the kernels make at most one a column, and a few a group; exact
// integer sums make none; the terms of a sum are no larger together than the norms' product, which
// is why kinds with mins are not screened), and tiny = 2^-100 for numbers below the smallest float.
// A row with s_v + e_v < max(s - e) is not the largest, whatever the weights. All else is computed
// by the head's own kernel, panel by panel, so that the result has the bits of the whole product.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "activations.h"
#include "quant.h"
#include "threads.h"

namespace nearfar {

enum class HeadMode : uint8_t {
  kFile,      // as the file has it
  kQ4,        // requantised to Q4_0: other logits
  kScreened,  // as the file has it; `greedy` looks at a smaller copy first
};

// "file", "q4" or "screened"; throws std::invalid_argument on another name.
HeadMode head_mode(std::string_view name);

// The matrix in kQ4 panels, rounded as nearfar.quant.quantize rounds to Q4_0. Throws
// std::invalid_argument when cols is no multiple of 32 or a weight is too large for a 16-bit scale.
PackedMat requantized(const RawTensor& w, float scale, ThreadPool& pool);

// What is kept of W and C to bound the error, rounded up.
struct ScreenBounds {
  int64_t cols = 0;
  std::vector<float> residual;  // [rows] |C_v - W_v|
  std::vector<float> size;      // [rows] |C_v|
};

// Whether the bound above holds for this head and a screen reads much less than its panels.
bool can_be_screened(const PackedMat& head);

// C, the copy that is looked at first, and its bounds; `head` is what pack(w) made.
PackedMat screen_copy(const RawTensor& w, const PackedMat& head, ThreadPool& pool,
                      ScreenBounds& bounds);

// Lengths of one input row as the head and the copy see it, and of the difference; rounded up.
struct InputNorms {
  double head, copy, difference;
};
InputNorms input_norms(const Rows& head, const Rows& copy, int64_t row);

// marks[p] = 1 for the panels p whose rows may hold the largest product, else 0; their number.
// `scores` [rows] are those of the copy. All panels if a number is not finite.
int64_t mark_candidates(const ScreenBounds& bounds, std::span<const float> scores,
                        const InputNorms& norms, ThreadPool& pool, std::span<uint8_t> marks);

}  // namespace nearfar
