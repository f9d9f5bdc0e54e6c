// AVX-512 kernels: Ice Lake, Zen 4 and later (F BW VL VNNI VBMI).
#include <immintrin.h>

#include "dot_gemv.h"

namespace nearfar {
namespace {

constexpr int64_t kManyRows = 0, kManySteps = 1;
inline void add_many(const uint8_t*, const int8_t*, int64_t, int64_t, int64_t, const uint8_t*, bool,
                     int32_t*) {}

}  // namespace
}  // namespace nearfar

#include "dot_gemv_zmm.h"

namespace nearfar {

Matmul* const avx512::kMatmul[kPanelKinds] = {
    matmul<Float<float>>,
    matmul<Float<F16>>,
    matmul<Float<BF16>>,
    matmul<T5>,
    matmul<I2>,
    matmul<I2Blocks>,
    matmul<Grouped<PanelKind::kQ4>>,
    matmul<Grouped<PanelKind::kQ4_1>>,
    matmul<Grouped<PanelKind::kInt8>>,
    matmul<Grouped<PanelKind::kQ2K>>,
    matmul<Grouped<PanelKind::kQ3K>>,
    matmul<Grouped<PanelKind::kQ4K>>,
    matmul<Grouped<PanelKind::kQ5K>>,
    matmul<Grouped<PanelKind::kQ6K>>,
    nullptr,  // kL3: lut_gemv_avx512.cc
    matmul<W8>,
    matmul<BF16Dot>,
};

}  // namespace nearfar
