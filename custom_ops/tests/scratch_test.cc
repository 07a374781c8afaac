// Work space that is kept from call to call: no two calls get the same.
#include "scratch.h"

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"

namespace bivlm::testing {
namespace {

bool IsAligned(const Scratch& scratch) {
  return reinterpret_cast<std::uintptr_t>(scratch.data()) % 64 == 0;
}

void Alive(Checker* check) {
  for (const std::size_t bytes : {0, 1, 1000, 500, 4096, 64}) {
    const Scratch first(bytes);
    const Scratch second(bytes);
    check->Expect(IsAligned(first) && IsAligned(second), bytes, " bytes: not aligned");
    check->Expect(bytes == 0 || first.data() + bytes <= second.data() ||
                      second.data() + bytes <= first.data(),
                  bytes, " bytes: two pieces overlap");
    if (bytes > 0) std::memset(first.data(), 1, bytes);
    if (bytes > 0) std::memset(second.data(), 2, bytes);
  }
}

#if !defined(__SANITIZE_ADDRESS__)
void LargestStays(Checker* check) {
  const std::byte* largest = nullptr;
  {
    const Scratch large(std::size_t{1} << 20);
    const Scratch small(100);
    largest = large.data();
  }
  const Scratch again(std::size_t{1} << 20);
  check->Expect(again.data() == largest, "the largest piece was not kept");
}
#endif

// Each call fills its piece and finds it as it left it.
void Threads(Checker* check) {
  std::vector<int> wrong(8);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([&wrong, t] {
      for (std::size_t turn = 0; turn < 500; ++turn) {
        const std::size_t bytes = 1 + (turn * 37 + t * 1009) % 5000;
        const Scratch scratch(bytes);
        std::memset(scratch.data(), static_cast<int>(t), bytes);
        std::this_thread::yield();
        for (std::size_t i = 0; i < bytes; ++i) {
          if (scratch.data()[i] != static_cast<std::byte>(t)) ++wrong[t];
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int count : wrong) check->Expect(count == 0, count, " bytes of another thread");
}

}  // namespace
}  // namespace bivlm::testing

int main() {
  bivlm::testing::Checker check;
  bivlm::testing::Alive(&check);
#if !defined(__SANITIZE_ADDRESS__)
  bivlm::testing::LargestStays(&check);
#endif
  bivlm::testing::Threads(&check);
  return check.Finish("scratch_test");
}
