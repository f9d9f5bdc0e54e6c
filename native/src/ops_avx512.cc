// The AVX-512 build of ops_body.h.
#include "ops_zmm.h"

namespace nearfar::avx512 {
const Ops kOps = kTable;
}
