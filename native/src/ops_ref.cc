// The portable build of ops_body.h: four floats at a time, f16 by scalar conversion.
#include "half.h"
#include "ops.h"

namespace nearfar {
namespace {

constexpr int kWidth = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));

inline Vec half_to_float(const uint16_t* p) {
  return Vec{f16_to_f32(p[0]), f16_to_f32(p[1]), f16_to_f32(p[2]), f16_to_f32(p[3])};
}
inline Vec byte_to_float(const int8_t* p) {
  return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
             static_cast<float>(p[3])};
}
inline void float_to_half(Vec v, uint16_t* p) {
  for (int i = 0; i < kWidth; ++i) p[i] = f32_to_f16(v[i]);
}

}  // namespace
}  // namespace nearfar

#include "ops_body.h"

namespace nearfar::ref {
const Ops kOps = kTable;
}
