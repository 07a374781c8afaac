// What the tests share: a counter of failures that prints the first ones, and guarded memory.
#ifndef BIVLM_TESTS_CHECK_H_
#define BIVLM_TESTS_CHECK_H_

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "bivlm/parallel.h"

namespace bivlm::testing {

inline constexpr int kSkipped = 77;  // SKIP_RETURN_CODE of CTest

class Checker {
 public:
  // Counts a failure unless `passed`; `parts` are printed one after the other.
  template <typename... Parts>
  void Expect(bool passed, const Parts&... parts) {
    ++checks_;
    if (passed) return;
    if (++failures_ > kPrinted) return;
    std::ostringstream text;
    text.precision(9);
    (text << ... << parts);
    std::fprintf(stderr, "FAILED %s\n", text.str().c_str());
  }

  // Prints the totals and returns the exit code.
  int Finish(const char* name) const {
    std::printf("%s: %zu checks, %zu failures\n", name, checks_, failures_);
    return failures_ == 0 && checks_ > 0 ? 0 : 1;
  }

 private:
  static constexpr std::size_t kPrinted = 20;
  std::size_t checks_ = 0;
  std::size_t failures_ = 0;
};

// Whether the next case of the longest tests runs: all do, or with BIVLM_TEST_EVERY=n, for slow
// emulators, each n-th.
inline bool RunsCase() {
  static const char* const text = std::getenv("BIVLM_TEST_EVERY");
  static const long every = text == nullptr ? 1 : std::strtol(text, nullptr, 10);
  static long next = 0;
  return every < 1 || next++ % every == 0;
}

// `bytes` bytes between two guards, to show writes outside.
class Guarded {
 public:
  explicit Guarded(std::size_t bytes) : memory_(bytes + 2 * kGuard, kCanary) {}
  void* data() { return memory_.data() + kGuard; }
  bool IsIntact() const {
    for (std::size_t i = 0; i < kGuard; ++i) {
      if (memory_[i] != kCanary || memory_[memory_.size() - 1 - i] != kCanary) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t kGuard = 256;
  static constexpr uint8_t kCanary = 0xA5;
  std::vector<uint8_t> memory_;
};

// A copy of `bytes` that starts `shift` bytes after an aligned address and ends with its memory.
class Unaligned {
 public:
  Unaligned(const void* bytes, std::size_t count, std::size_t shift) : memory_(count + shift) {
    shift_ = shift;
    if (count > 0) std::memcpy(memory_.data() + shift, bytes, count);
  }
  const uint8_t* data() const { return memory_.data() + shift_; }

 private:
  std::vector<uint8_t> memory_;
  std::size_t shift_ = 0;
};

// So many threads per call, the last tasks first: results must not depend on the order.
template <std::size_t threads>
Executor ThreadsOf() {
  const auto run = [](void*, std::size_t total, void (*body)(void*, std::size_t), void* context) {
    std::vector<std::thread> started;
    for (std::size_t first = 0; first < threads; ++first) {
      started.emplace_back([=] {
        for (std::size_t i = first; i < total; i += threads) body(context, total - 1 - i);
      });
    }
    for (std::thread& thread : started) thread.join();
  };
  return {run, nullptr};
}

inline Executor ThreeThreads() { return ThreadsOf<3>(); }

}  // namespace bivlm::testing

#endif  // BIVLM_TESTS_CHECK_H_
