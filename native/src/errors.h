// What can stop a call, beside std::invalid_argument (a shape, a name, a range) and std::bad_alloc.
// The binding gives each a Python exception of the same name.
#pragma once

#include <stdexcept>

namespace nearfar {

// A second thread entered an engine or a cache that is at work.
struct EngineBusy : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The cancel flag was set; everything is as it was before the call.
struct Cancelled : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// More positions than the cache may hold.
struct ContextFull : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A cut so deep that the window behind it has been forgotten.
struct KvTruncated : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A number that is not finite, or threads that do not exist any more.
struct EngineFailure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace nearfar
