// The scalar truth of the kernels: one output at a time, each weight read from the panel by its
// index. Runs anywhere; the other ISAs must give the same bits.
#include <math.h>
#include <string.h>

#include "check.h"
#include "dot_gemv.h"
#include "half.h"
#include "read_panel.h"

namespace nearfar::ref {
namespace {

// Row i of the activations.
struct Activations {
  Activations(const Rows& x, int64_t i)
      : q(x.q + i * x.q_stride), scales(x.scales + i * x.n_scales), sums(x.sums + i * x.n_sums) {}
  const int8_t* q;
  const float* scales;
  const int32_t* sums;
};

// sum q * (code - offset) over k in [first, first + n)
int32_t dot(const PanelRow& w, const int8_t* q, int64_t first, int64_t n) {
  int32_t sum = 0;
  for (int64_t k = first; k < first + n; ++k) sum += q[k] * w.code(k);
  return sum;
}

int32_t sum_q(const int8_t* q, int64_t first, int64_t n) {
  int32_t sum = 0;
  for (int64_t k = first; k < first + n; ++k) sum += q[k];
  return sum;
}

float row_product(const PanelRow& w, const Activations& x, int64_t cols, float row_scale) {
  return row_scale * x.scales[0] * static_cast<float>(dot(w, x.q, 0, cols));
}

float blocks_product(const PanelRow& w, const Activations& x, int64_t cols) {
  float total = 0;
  for (int64_t k = 0; k < cols; k += 256) {
    total = fmaf(w.d(k), static_cast<float>(dot(w, x.q, k, 256)), total);
  }
  return total * x.scales[0];
}

float group_product(const PanelRow& w, const Activations& x, int64_t cols, bool has_min) {
  float total = 0;
  for (int64_t k = 0; k < cols; k += 32) {
    const float s_x = x.scales[k / 32];
    total = fmaf(w.d(k) * s_x, static_cast<float>(dot(w, x.q, k, 32)), total);
    if (has_min) total = fmaf(w.dmin(k) * s_x, static_cast<float>(sum_q(x.q, k, 32)), total);
  }
  return total;
}

float super_product(const PanelRow& w, const Activations& x, int64_t cols, const Form& f) {
  float total = 0;
  for (int64_t first = 0; first < cols; first += 256) {
    const float s_x = x.scales[first / 256];
    float scaled = 0, mins = 0;
    for (int64_t k = first; k < first + 256; k += f.group) {
      const auto sum = static_cast<float>(dot(w, x.q, k, f.group));
      scaled = fmaf(static_cast<float>(w.scale(k)), sum, scaled);
      if (!f.has_min) continue;
      const auto sum_x = static_cast<float>(sum_q(x.q, k, f.group));
      mins = fmaf(static_cast<float>(w.min(k)), sum_x, mins);
    }
    total = fmaf(w.d(first) * s_x, scaled, total);
    if (f.has_min) total = fmaf(-(w.dmin(first) * s_x), mins, total);
  }
  return total;
}

void matmul_codes(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                  int64_t ldy) {
  NF_DCHECK(w.cols == x.cols);
  const Form& f = kForms[static_cast<int>(w.kind)];
  const int64_t end = last * kPanelRows < w.rows ? last * kPanelRows : w.rows;
  for (int64_t n = first * kPanelRows; n < end; ++n) {
    const PanelRow row(w, n);
    for (int64_t i = 0; i < x.m; ++i) {
      const Activations xi(x, i);
      const float product = f.scheme == Scheme::kRow ? row_product(row, xi, w.cols, w.row_scales[n])
                            : f.scheme == Scheme::kBlocks ? blocks_product(row, xi, w.cols)
                            : f.scheme == Scheme::kGroup ? group_product(row, xi, w.cols, f.has_min)
                                                         : super_product(row, xi, w.cols, f);
      y[i * ldy + n] = product * w.scale;
    }
  }
}

float load_f16(const uint8_t* p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return f16_to_f32(h);
}

float load_bf16(const uint8_t* p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return bf16_to_f32(h);
}

float load_f32(const uint8_t* p) {
  float f;
  memcpy(&f, p, 4);
  return f;
}

template <int kBytes, float (*kLoad)(const uint8_t*)>
void matmul_float(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                  int64_t ldy) {
  NF_DCHECK(w.cols == x.cols);
  const int64_t end = last * kPanelRows < w.rows ? last * kPanelRows : w.rows;
  for (int64_t n = first * kPanelRows; n < end; ++n) {
    const uint8_t* p = w.data + n / kPanelRows * w.panel_bytes + n % kPanelRows * kBytes;
    for (int64_t i = 0; i < x.m; ++i) {
      const float* xi = x.x + i * x.x_stride;
      float sum = 0;
      for (int64_t k = 0; k < w.cols; ++k)
        sum = fmaf(kLoad(p + k * kPanelRows * kBytes), xi[k], sum);
      y[i * ldy + n] = sum * w.scale;
    }
  }
}

// Pairs of k beside each other, activations of bf16; the order of k is that of the others.
void matmul_bf16_dot(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                     int64_t ldy) {
  NF_DCHECK(w.cols == x.cols);
  const int64_t end = last * kPanelRows < w.rows ? last * kPanelRows : w.rows;
  for (int64_t n = first * kPanelRows; n < end; ++n) {
    const uint8_t* p = w.data + n / kPanelRows * w.panel_bytes + n % kPanelRows * 4;
    for (int64_t i = 0; i < x.m; ++i) {
      const uint16_t* xi = x.bf16 + i * x.bf16_stride;
      float sum = 0;
      for (int64_t k = 0; k < w.cols; ++k) {
        sum = fmaf(load_bf16(p + k / 2 * kStepBytes + k % 2 * 2), bf16_to_f32(xi[k]), sum);
      }
      y[i * ldy + n] = sum * w.scale;
    }
  }
}

}  // namespace

Matmul* const kMatmul[kPanelKinds] = {matmul_float<4, load_f32>,
                                      matmul_float<2, load_f16>,
                                      matmul_float<2, load_bf16>,
                                      matmul_codes,
                                      matmul_codes,
                                      matmul_codes,
                                      matmul_codes,
                                      matmul_codes,
                                      matmul_codes,
                                      matmul_codes,
                                      matmul_codes,
                                      matmul_codes,
                                      matmul_codes,
                                      matmul_codes,
                                      nullptr,  // kL3: lut_gemv_ref.cc
                                      matmul_codes,
                                      matmul_bf16_dot};

}  // namespace nearfar::ref
