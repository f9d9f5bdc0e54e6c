// How fast this machine reads memory: the roof over decoding, which reads every weight once a
// token.
#pragma once

#include <cstddef>

namespace nearfar {

// Gigabytes (1e9) a second that `n_threads` read together from a buffer of `n_bytes`, best of
// `n_passes`. Four times the last cache makes it memory bandwidth. The buffer is of the kind that
// weights lie in, and is freed at the end. Throws std::invalid_argument below 1 MiB or 1 pass,
// std::bad_alloc.
double read_bandwidth(int n_threads, size_t n_bytes, int n_passes = 5);

}  // namespace nearfar
