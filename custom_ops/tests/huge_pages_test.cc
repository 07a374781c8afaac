// Copies in huge pages: contents, sharing, lifetime, and the values of BIVLM_HUGE_PAGES.
#include "../src/ort/huge_pages.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>

#include "check.h"

namespace bivlm::ort {
namespace {

using testing::Checker;

std::string ProblemOf(const char* value) {
  setenv("BIVLM_HUGE_PAGES", value, 1);  // NOLINT(concurrency-mt-unsafe)
  try {
    HugePagesWanted();
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

bool Wanted(const char* value) { return ProblemOf(value).empty() && HugePagesWanted(); }

void Values(Checker* check) {
  check->Expect(!Wanted("") && !Wanted("0"), "switched off by nothing and by 0");
  check->Expect(Wanted("1"), "switched on by 1");
  for (const char* value : {"2", "yes", "01", " 1"}) {
    check->Expect(ProblemOf(value).find("BIVLM_HUGE_PAGES=") == 0, "refused value: ", value);
  }
  unsetenv("BIVLM_HUGE_PAGES");  // NOLINT(concurrency-mt-unsafe)
  check->Expect(!HugePagesWanted(), "off by default");
}

std::vector<uint8_t> Bytes(std::size_t count, unsigned seed) {
  std::vector<uint8_t> bytes(count);
  for (std::size_t i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(i * 31 + i / 251 + seed);
  return bytes;
}

bool Equal(const std::shared_ptr<const uint8_t>& copy, const std::vector<uint8_t>& bytes) {
  return std::memcmp(copy.get(), bytes.data(), bytes.size()) == 0;
}

void Copies(Checker* check) {
  // Small ones, one larger than the space that copies share, and small ones after it.
  const std::size_t sizes[] = {1, 63, 64, 65, 3 << 20, (64 << 20) + 1, 100, 5 << 20};
  std::vector<std::vector<uint8_t>> originals;
  std::vector<std::shared_ptr<const uint8_t>> copies;
  for (const std::size_t size : sizes) {
    originals.push_back(Bytes(size, static_cast<unsigned>(originals.size())));
    copies.push_back(CopyToHugePages(originals.back().data(), size));
  }
  for (std::size_t i = 0; i < copies.size(); ++i) {
    check->Expect(Equal(copies[i], originals[i]), "copy of ", originals[i].size(), " bytes");
    check->Expect(reinterpret_cast<std::size_t>(copies[i].get()) % 64 == 0, "alignment of ", i);
  }
  check->Expect(copies[1].get() == copies[0].get() + 64, "small copies lie side by side");
  // Each copy keeps its pages, whatever goes first.
  for (std::size_t i = 0; i + 1 < copies.size(); ++i) {
    copies[i].reset();
    check->Expect(Equal(copies.back(), originals.back()), "last copy after freeing ", i);
  }
  copies.clear();
  const std::vector<uint8_t> again = Bytes(1000, 9);
  check->Expect(Equal(CopyToHugePages(again.data(), again.size()), again), "copy after all freed");
}

void Threads(Checker* check) {
  const std::vector<uint8_t> original = Bytes(100000, 3);
  std::vector<std::shared_ptr<const uint8_t>> copies(16);
  std::vector<std::thread> threads;
  for (auto& copy : copies) {
    threads.emplace_back(
        [&copy, &original] { copy = CopyToHugePages(original.data(), original.size()); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& copy : copies) check->Expect(Equal(copy, original), "copy on a thread");
}

}  // namespace
}  // namespace bivlm::ort

int main() {
  bivlm::testing::Checker check;
  bivlm::ort::Values(&check);
  try {
    bivlm::ort::Copies(&check);
    bivlm::ort::Threads(&check);
  } catch (const std::runtime_error& error) {  // a system without huge pages
    std::printf("skipped: %s\n", error.what());
    return check.Finish("huge_pages_test") == 0 ? bivlm::testing::kSkipped : 1;
  }
  return check.Finish("huge_pages_test");
}
