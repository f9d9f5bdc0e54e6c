// The pool under all parallel sections of the engine, and the guard that keeps a second caller out.
//
// A section is a number of chunks; threads take the next chunk from an atomic counter until none is
// left.  The calling (engine) thread works too and never waits for a thread that has not woken up,
// so that a busy machine costs a section at most the chunks that a sleeping thread had already
// taken.  Results must not depend on who takes what.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace nearfar {

// Physical cores that this process may use (affinity mask; hardware threads of one core count
// once), at least 1.
int default_threads();

class ThreadPool {
 public:
  // Starts n_threads - 1 threads; with n_threads = 1 there is no pool and `run` is a plain loop.
  // Throws std::invalid_argument outside 1..256, std::system_error if the system refuses a thread.
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;

  // Throws EngineFailure in a process that was forked after the pool was made: its threads stayed
  // in the parent.
  void check_process() const;

  // Calls work(chunk, worker) once for each chunk in [0, n_chunks), with 0 <= worker < size() and
  // never twice at a time for one worker; returns when all are done.  Rethrows the first exception.
  // Not reentrant; allocates nothing.
  template <typename Work>
  void run(int64_t n_chunks, const Work& work, bool alone = false) {
    const Call call = [](const void* context, int64_t chunk, int worker) {
      (*static_cast<const Work*>(context))(chunk, worker);
    };
    run_chunks(n_chunks, call, &work, alone);
  }

 private:
  using Call = void (*)(const void* context, int64_t chunk, int worker);
  void run_chunks(int64_t n_chunks, Call call, const void* context, bool alone);

  struct State;
  std::unique_ptr<State> state_;
};

// Holds `flag` for its lifetime; throws EngineBusy(message) if somebody else does.
class Occupied {
 public:
  Occupied(std::atomic_flag& flag, const char* message);
  ~Occupied() { flag_.clear(std::memory_order_release); }
  Occupied(const Occupied&) = delete;
  Occupied& operator=(const Occupied&) = delete;

 private:
  std::atomic_flag& flag_;
};

}  // namespace nearfar
