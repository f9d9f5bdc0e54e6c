// The scalar truth of the kernels: one output at a time, each weight read from the panel by its
// index. Runs anywhere; the other ISAs must give the same bits.
#include <math.h>
#include <string.h>

#include "check.h"
#include "dot_gemv.h"
#include "half.h"

namespace nearfar::ref {
namespace {

// y[i, n] = product(panel, row in panel, n, i) * scale
template <class Product>
void for_each_output(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                     int64_t ldy, const Product& product) {
  NF_DCHECK(w.cols == x.cols);
  const int64_t end = last * kPanelRows < w.rows ? last * kPanelRows : w.rows;
  for (int64_t n = first * kPanelRows; n < end; ++n) {
    const uint8_t* panel = w.data + n / kPanelRows * w.panel_bytes;
    for (int64_t i = 0; i < x.m; ++i) {
      y[i * ldy + n] = product(panel, n % kPanelRows, n, i) * w.scale;
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

// Byte c of lane r in step s of a panel's codes.
int byte_at(const uint8_t* codes, int64_t s, int64_t r, int64_t c) {
  return codes[s * 256 + r * 4 + c];
}

// sum q * code over k values, 16 a step, code 0..3
int32_t dot_i2(const uint8_t* codes, int64_t r, const int8_t* q, int64_t k) {
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) {
    const int64_t field = i % 16 / 4;
    sum += q[i] * ((byte_at(codes, i / 16, r, i % 4) >> (2 * field)) & 3);
  }
  return sum;
}

// sum q * code over 32 values, 8 a step, code 0..15
int32_t dot_q4(const uint8_t* codes, int64_t r, const int8_t* q) {
  int32_t sum = 0;
  for (int64_t i = 0; i < 32; ++i) {
    const int64_t nibble = i % 8 / 4;
    sum += q[i] * ((byte_at(codes, i / 8, r, i % 4) >> (4 * nibble)) & 15);
  }
  return sum;
}

// sum q * w over k values, 4 a step, byte = w + 128
int32_t dot_int8(const uint8_t* codes, int64_t r, const int8_t* q, int64_t k) {
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += q[i] * (byte_at(codes, i / 4, r, i % 4) - 128);
  return sum;
}

template <int kBytes, float (*kLoad)(const uint8_t*)>
void matmul_float(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                  int64_t ldy) {
  for_each_output(w, x, first, last, y, ldy, [&](const uint8_t* p, int64_t r, int64_t, int64_t i) {
    const float* xi = x.x + i * x.x_stride;
    float sum = 0;
    for (int64_t k = 0; k < w.cols; ++k) {
      sum = fmaf(kLoad(p + (k * kPanelRows + r) * kBytes), xi[k], sum);
    }
    return sum;
  });
}

}  // namespace

void matmul_f32(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                int64_t ldy) {
  matmul_float<4, load_f32>(w, x, first, last, y, ldy);
}

void matmul_f16(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                int64_t ldy) {
  matmul_float<2, load_f16>(w, x, first, last, y, ldy);
}

void matmul_bf16(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                 int64_t ldy) {
  matmul_float<2, load_bf16>(w, x, first, last, y, ldy);
}

void matmul_i2(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y, int64_t ldy) {
  for_each_output(w, x, first, last, y, ldy,
                  [&](const uint8_t* p, int64_t r, int64_t n, int64_t i) {
                    int32_t sum = dot_i2(p, r, x.q + i * x.q_stride, w.cols);
                    for (int64_t j = 0; j < x.n_sums; ++j) sum -= x.sums[i * x.n_sums + j];
                    return w.row_scales[n] * x.scales[i] * static_cast<float>(sum);
                  });
}

void matmul_i2_blocks(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                      int64_t ldy) {
  for_each_output(w, x, first, last, y, ldy, [&](const uint8_t* p, int64_t r, int64_t, int64_t i) {
    float total = 0;
    for (int64_t j = 0; j < w.cols / 256; ++j, p += 256 + 16 * 256) {
      const int8_t* q = x.q + i * x.q_stride + j * 256;
      const int32_t sum = dot_i2(p + 256, r, q, 256) - x.sums[i * x.n_sums + j];
      total = fmaf(load_f32(p + r * 4), static_cast<float>(sum), total);
    }
    return total * x.scales[i];
  });
}

void matmul_q4(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y, int64_t ldy) {
  for_each_output(w, x, first, last, y, ldy, [&](const uint8_t* p, int64_t r, int64_t, int64_t i) {
    float total = 0;
    for (int64_t j = 0; j < w.cols / 32; ++j, p += 128 + 4 * 256) {
      const int32_t sum =
          dot_q4(p + 128, r, x.q + i * x.q_stride + j * 32) - 8 * x.sums[i * x.n_sums + j];
      const float scale = load_f16(p + r * 2) * x.scales[i * x.n_scales + j];
      total = fmaf(scale, static_cast<float>(sum), total);
    }
    return total;
  });
}

void matmul_q4_k(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                 int64_t ldy) {
  for_each_output(w, x, first, last, y, ldy, [&](const uint8_t* p, int64_t r, int64_t, int64_t i) {
    float total = 0;
    for (int64_t j = 0; j < w.cols / 256; ++j) {
      const float s_x = x.scales[i * x.n_scales + j];
      const float d = load_f16(p + r * 2) * s_x, dmin = load_f16(p + 128 + r * 2) * s_x;
      const int32_t* sums = x.sums + i * x.n_sums + j * 16;
      int32_t scaled = 0, mins = 0;
      p += 256;
      for (int64_t g = 0; g < 8; ++g, p += 128 + 4 * 256) {
        scaled += p[r] * dot_q4(p + 128, r, x.q + i * x.q_stride + j * 256 + g * 32);
        mins += p[64 + r] * (sums[2 * g] + sums[2 * g + 1]);
      }
      total = fmaf(d, static_cast<float>(scaled), total);
      total = fmaf(-dmin, static_cast<float>(mins), total);
    }
    return total;
  });
}

void matmul_int8(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                 int64_t ldy) {
  for_each_output(w, x, first, last, y, ldy, [&](const uint8_t* p, int64_t r, int64_t, int64_t i) {
    float total = 0;
    for (int64_t j = 0; j < w.cols / 32; ++j, p += 128 + 8 * 256) {
      const int32_t sum = dot_int8(p + 128, r, x.q + i * x.q_stride + j * 32, 32);
      const float scale = load_f16(p + r * 2) * x.scales[i * x.n_scales + j];
      total = fmaf(scale, static_cast<float>(sum), total);
    }
    return total;
  });
}

void matmul_int8_k(const Panels& w, const Rows& x, int64_t first, int64_t last, float* y,
                   int64_t ldy) {
  for_each_output(w, x, first, last, y, ldy, [&](const uint8_t* p, int64_t r, int64_t, int64_t i) {
    float total = 0;
    for (int64_t j = 0; j < w.cols / 256; ++j) {
      const float d = load_f16(p + r * 2) * x.scales[i * x.n_scales + j];
      int32_t scaled = 0;
      p += 128;
      for (int64_t g = 0; g < 16; ++g, p += 64 + 4 * 256) {
        const int8_t* q = x.q + i * x.q_stride + j * 256 + g * 16;
        scaled += static_cast<int8_t>(p[r]) * dot_int8(p + 64, r, q, 16);
      }
      total = fmaf(d, static_cast<float>(scaled), total);
    }
    return total;
  });
}

}  // namespace nearfar::ref
