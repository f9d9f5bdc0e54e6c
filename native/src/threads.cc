#include "threads.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <fstream>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

#include "errors.h"

namespace nearfar {
namespace {

constexpr int kMaxThreads = 256;
constexpr auto kSpin =
    std::chrono::microseconds(50);  // sections of one token follow each other within microseconds

// Tells the core that this is a spin loop: saves power and leaves the pipeline to the other
// hardware thread.
inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// True as soon as `ready()` is; false when the spin time is over.
template <typename Ready>
bool spin_until(Ready ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

#if defined(__linux__)
// What identifies the physical core of a CPU: the list of the hardware threads that share it.
std::string core_of(int cpu) {
  std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                     "/topology/thread_siblings_list");
  std::string siblings;
  return std::getline(file, siblings) ? siblings : std::to_string(cpu);
}
#endif

}  // namespace

int default_threads() {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
    std::set<std::string> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &allowed)) cores.insert(core_of(cpu));
    }
    return std::clamp(static_cast<int>(cores.size()), 1, kMaxThreads);
  }
#endif
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMaxThreads);
}

// A job is published by storing `unclaimed`; who lowers it by one owns that chunk, and the job
// cannot end (nor its fields change) before that chunk is done.  So a thread that wakes late finds
// either a live job or zero.
struct ThreadPool::State {
  std::atomic<int64_t> unclaimed{0};
  std::atomic<int64_t> unfinished{0};
  Call call = nullptr;
  const void* context = nullptr;
  int64_t n_chunks = 0;

  std::mutex mutex;
  std::condition_variable work_came, work_done;
  std::atomic<int> n_asleep{0};
  std::atomic<bool> owner_asleep{false}, stop{false};
  std::exception_ptr failure;  // under `mutex`
  std::atomic<bool> failed{false};

  std::vector<std::thread> threads;
  int n_threads = 1;
  pid_t process = getpid();

  // Claims and runs one chunk; false if there was none.
  bool run_one(int worker) {
    int64_t left = unclaimed.load();
    do {
      if (left <= 0) return false;
    } while (!unclaimed.compare_exchange_weak(left, left - 1));
    if (!failed.load(std::memory_order_relaxed)) {
      try {
        call(context, n_chunks - left, worker);
      } catch (...) {
        std::lock_guard lock(mutex);
        if (!failure) failure = std::current_exception();
        failed.store(true, std::memory_order_relaxed);
      }
    }
    if (unfinished.fetch_sub(1) == 1 && owner_asleep.load()) {
      std::lock_guard lock(mutex);
      work_done.notify_one();
    }
    return true;
  }

  void serve(int worker) {
    const auto ready = [this] { return unclaimed.load() > 0 || stop.load(); };
    while (!stop.load()) {
      while (run_one(worker)) {
      }
      if (spin_until(ready)) continue;
      std::unique_lock lock(mutex);
      n_asleep.fetch_add(1);
      work_came.wait(lock, ready);
      n_asleep.fetch_sub(1);
    }
  }

  void finish() {
    stop.store(true);
    {
      std::lock_guard lock(mutex);
      work_came.notify_all();
    }
    for (auto& thread : threads) thread.join();
  }
};

ThreadPool::ThreadPool(int n_threads) : state_(std::make_unique<State>()) {
  if (n_threads < 1 || n_threads > kMaxThreads) {
    throw std::invalid_argument("threads=" + std::to_string(n_threads) + ": expected 1.." +
                                std::to_string(kMaxThreads));
  }
  state_->n_threads = n_threads;
  try {
    for (int worker = 1; worker < n_threads; ++worker) {
      state_->threads.emplace_back([state = state_.get(), worker] { state->serve(worker); });
    }
  } catch (...) {
    state_->finish();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  if (state_->process == getpid()) {
    state_->finish();
  } else {
    state_.release();  // a forked child: the threads to join and the lock that they may hold exist
                       // in the parent only
  }
}

int ThreadPool::size() const { return state_->n_threads; }

void ThreadPool::check_process() const {
  if (state_->n_threads > 1 && state_->process != getpid()) {
    throw EngineFailure(
        "the model was opened before os.fork() and its threads stayed in the parent: open it again "
        "in the child");
  }
}

void ThreadPool::run_chunks(int64_t n_chunks, Call call, const void* context, bool alone) {
  State& s = *state_;
  if (s.n_threads == 1 || n_chunks <= 1 || alone) {
    for (int64_t chunk = 0; chunk < n_chunks; ++chunk) call(context, chunk, 0);
    return;
  }
  s.call = call, s.context = context, s.n_chunks = n_chunks;
  s.unfinished.store(n_chunks);
  s.unclaimed.store(n_chunks);
  if (s.n_asleep.load() > 0) {
    std::lock_guard lock(s.mutex);
    s.work_came.notify_all();
  }
  while (s.run_one(0)) {
  }
  const auto done = [&s] { return s.unfinished.load() == 0; };
  if (!spin_until(done)) {
    std::unique_lock lock(s.mutex);
    s.owner_asleep.store(true);
    s.work_done.wait(lock, done);
    s.owner_asleep.store(false);
  }
  if (s.failed.load()) {
    std::lock_guard lock(s.mutex);
    s.failed.store(false);
    std::rethrow_exception(std::exchange(s.failure, nullptr));
  }
}

Occupied::Occupied(std::atomic_flag& flag, const char* message) : flag_(flag) {
  if (flag.test_and_set(std::memory_order_acquire)) throw EngineBusy(message);
}

}  // namespace nearfar
