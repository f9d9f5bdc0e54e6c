// The NEON build of ops_body.h, for every 64-bit ARM: dotprod and i8mm bring nothing to floats.
#include <arm_neon.h>

#include "ops.h"

namespace nearfar {
namespace {

constexpr int kWidth = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));

// FCVTL and FCVTN round to nearest even and keep denormals, as Linux and macOS set FPCR.
inline Vec half_to_float(const uint16_t* p) {
  return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
inline Vec byte_to_float(const int8_t* p) {
  int32_t four;  // VLD1 would read eight bytes, past the end of the last row
  __builtin_memcpy(&four, p, sizeof(four));
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
  return (Vec)vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
inline void float_to_half(Vec v, uint16_t* p) {
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
}

}  // namespace
}  // namespace nearfar

#include "ops_body.h"

namespace nearfar::neon {
const Ops kOps = kTable;
}
