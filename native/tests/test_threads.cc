#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>
#include <vector>

#include "errors.h"
#include "threads.h"

namespace nearfar::tests {
namespace {

TEST_CASE("each chunk runs once, whatever the number of threads") {
  for (const int n_threads : {1, 2, 5}) {
    ThreadPool pool(n_threads);
    for (int section = 0; section < 300; ++section) {
      const int64_t n_chunks = section % 7 == 0 ? 0 : section % 23;
      std::vector<std::atomic<int>> runs(n_chunks);
      std::atomic<int> bad_workers{0};
      pool.run(n_chunks, [&](int64_t chunk, int worker) {
        runs[chunk].fetch_add(1);
        if (worker < 0 || worker >= n_threads) bad_workers.fetch_add(1);
      });
      for (const auto& n : runs) CHECK(n.load() == 1);
      CHECK(bad_workers.load() == 0);
    }
  }
}

TEST_CASE("threads that fell asleep wake up for the next section") {
  ThreadPool pool(2);
  for (int pause = 0; pause < 3; ++pause) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // far longer than they spin
    std::atomic<bool> other_came{false};
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    pool.run(2, [&](int64_t, int worker) {
      if (worker == 1) other_came = true;
      while (worker == 0 && !other_came && std::chrono::steady_clock::now() < deadline) {
      }
    });
    CHECK(other_came.load());
  }
}

TEST_CASE("a thread that is held up keeps its own chunk only: the others finish the rest") {
  constexpr int64_t kChunks = 50;
  ThreadPool pool(2);
  for (int section = 0; section < 3; ++section) {
    std::atomic<int64_t> n_done{0};
    std::atomic<bool> held{false}, late{false};
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    pool.run(kChunks, [&](int64_t, int worker) {
      if (worker == 1 && !held.exchange(true)) {  // as if another process had taken its core
        while (n_done.load() < kChunks - 1 && !late) {
          late = std::chrono::steady_clock::now() > deadline;
        }
      }
      while (worker == 0 && !held.load() && !late) {  // so that there is somebody to be held up
        late = std::chrono::steady_clock::now() > deadline;
      }
      n_done.fetch_add(1);
    });
    CHECK(n_done.load() == kChunks);
    CHECK_FALSE(late.load());
  }
}

TEST_CASE("sections that follow each other closely or after a pause all end") {
  ThreadPool pool(4);  // more threads than most machines that run this have idle cores
  int64_t n = 0;
  std::atomic<int64_t> done{0};
  for (int section = 0; section < 2000; ++section) {
    if (section % 500 == 499) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const int64_t n_chunks = 2 + section % 5;
    pool.run(n_chunks, [&](int64_t, int) { done.fetch_add(1, std::memory_order_relaxed); });
    n += n_chunks;
    REQUIRE(done.load() == n);
  }
}

TEST_CASE("work that is marked as small stays on the calling thread") {
  ThreadPool pool(3);
  const auto caller = std::this_thread::get_id();
  int64_t n = 0;
  pool.run(
      100,
      [&](int64_t, int worker) {
        CHECK(worker == 0);
        CHECK(std::this_thread::get_id() == caller);
        ++n;
      },
      /*alone=*/true);
  CHECK(n == 100);
}

TEST_CASE("an exception reaches the caller and the pool goes on") {
  for (const int n_threads : {1, 3}) {
    ThreadPool pool(n_threads);
    for (int64_t bad = 0; bad < 40; bad += 13) {
      const auto fail = [&](int64_t chunk, int) {
        if (chunk == bad) throw EngineFailure("chunk");
      };
      CHECK_THROWS_AS(pool.run(40, fail), EngineFailure);
      std::atomic<int> n{0};
      pool.run(40, [&](int64_t, int) { n.fetch_add(1); });
      CHECK(n.load() == 40);
    }
  }
}

TEST_CASE("numbers of threads outside the range are refused") {
  CHECK_THROWS_AS(ThreadPool(0), std::invalid_argument);
  CHECK_THROWS_AS(ThreadPool(257), std::invalid_argument);
  CHECK(default_threads() >= 1);
}

TEST_CASE("a forked child is told, and can drop the pool") {
  auto pool = std::make_unique<ThreadPool>(2);
  pool->check_process();
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a child that hangs fails the test
    int code = 1;
    try {
      pool->check_process();
    } catch (const EngineFailure&) {
      code = 42;
    }
    pool.reset();
    _exit(code);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 42);
}

TEST_CASE("a second holder gets EngineBusy, a later one does not") {
  std::atomic_flag flag = ATOMIC_FLAG_INIT;
  {
    const Occupied first(flag, "busy");
    CHECK_THROWS_AS(Occupied(flag, "busy"), EngineBusy);
  }
  CHECK_NOTHROW(Occupied(flag, "busy"));
}

}  // namespace
}  // namespace nearfar::tests
