// Threads for the benchmarks. The library itself starts none.
#ifndef BIVLM_BENCH_THREAD_POOL_H_
#define BIVLM_BENCH_THREAD_POOL_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "bivlm/parallel.h"

namespace bivlm::bench {

// `threads` threads with the one that calls. The others spin while they wait, as those of ONNX
// Runtime do between the nodes of a graph.
class ThreadPool {
 public:
  explicit ThreadPool(std::size_t threads) {
    for (std::size_t i = 1; i < threads; ++i) workers_.emplace_back([this] { Work(); });
  }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool() {
    stop_ = true;
    for (std::thread& worker : workers_) worker.join();
  }

  Executor executor() {
    if (workers_.empty()) return {};
    return {[](void* pool, std::size_t total, void (*body)(void*, std::size_t), void* context) {
              static_cast<ThreadPool*>(pool)->Run(total, body, context);
            },
            this};
  }

 private:
  // The caller does not wait for threads that have not begun: on a busy machine they may be late.
  void Run(std::size_t total, void (*body)(void*, std::size_t), void* context) {
    total_ = 0;  // no task is taken before all is set
    body_ = body;
    context_ = context;
    done_ = 0;
    ticket_ = (ticket_ / kRound + 1) * kRound;
    total_ = total;
    TakeTasks();
    while (done_ < total) std::this_thread::yield();
  }

  void TakeTasks() {
    uint64_t ticket = ticket_;
    while (ticket % kRound < total_) {
      // Fails if another thread took this task, or all are done and a new round has begun.
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
      body_.load()(context_, ticket % kRound);
      ++done_;
      ticket = ticket_;
    }
  }

  void Work() {
    while (!stop_) {
      TakeTasks();
      std::this_thread::yield();
    }
  }

  static constexpr uint64_t kRound = uint64_t{1} << 32;
  std::atomic<uint64_t> ticket_{0};  // kRound * round + next task
  std::atomic<std::size_t> total_{0};
  std::atomic<std::size_t> done_{0};
  std::atomic<void (*)(void*, std::size_t)> body_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace bivlm::bench

#endif  // BIVLM_BENCH_THREAD_POOL_H_
