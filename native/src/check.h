// Checks of our own invariants in inner loops: active in debug and sanitizer builds, gone in
// release. What a caller can get wrong is checked at the public door instead and throws
// std::invalid_argument.
#pragma once

#include <assert.h>

#ifdef NDEBUG
#define NF_DCHECK(condition) ((void)sizeof(!(condition)))
#else
#define NF_DCHECK(condition) assert(condition)
#endif
