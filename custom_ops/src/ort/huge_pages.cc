#include "huge_pages.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>

#include "adaptor.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace bivlm::ort {
namespace {

constexpr char kVariable[] = "BIVLM_HUGE_PAGES";

#ifdef __linux__

constexpr std::size_t kPageBytes = std::size_t{2} << 20;
constexpr std::size_t kAlignment = 64;

// Address space that copies share. Only pages that are written take memory.
constexpr std::size_t kRegionBytes = std::size_t{64} << 20;

std::size_t RoundUp(std::size_t value, std::size_t unit) {
  return (value + unit - 1) / unit * unit;
}

[[noreturn]] void Fail(const std::string& what) {
  throw std::runtime_error(std::string(kVariable) + "=1: " + what + "; unset " + kVariable +
                           " to use the weights where they are mapped");
}

// Without this, madvise succeeds where the administrator has switched huge pages off.
void RequireHugePages() {
  const char* const path = "/sys/kernel/mm/transparent_hugepage/enabled";
  std::string modes;
  std::getline(std::ifstream(path), modes);
  if (modes.empty()) Fail("this kernel has no transparent huge pages (" + std::string(path) + ")");
  if (modes.find("[never]") != std::string::npos) {
    Fail("transparent huge pages are off: " + std::string(path) + " says '" + modes + "'");
  }
}

// Anonymous memory in huge pages.
class Region {
 public:
  explicit Region(std::size_t bytes) : mapped_bytes_(RoundUp(bytes, kPageBytes) + kPageBytes) {
    RequireHugePages();
    mapped_ =
        mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped_ == MAP_FAILED) {
      Fail("cannot map " + std::to_string(mapped_bytes_) +
           " bytes: " + std::generic_category().message(errno));
    }
    const std::size_t address = reinterpret_cast<std::size_t>(mapped_);
    const std::size_t skipped = RoundUp(address, kPageBytes) - address;
    begin_ = static_cast<uint8_t*>(mapped_) + skipped;
    capacity_ = mapped_bytes_ - kPageBytes;
    if (madvise(begin_, capacity_, MADV_HUGEPAGE) != 0) {
      const int error = errno;
      munmap(mapped_, mapped_bytes_);
      Fail("madvise(MADV_HUGEPAGE) failed: " + std::generic_category().message(error));
    }
  }
  ~Region() { munmap(mapped_, mapped_bytes_); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // `bytes` bytes of the region, or null if it is full.
  uint8_t* Take(std::size_t bytes) {
    const std::size_t begin = RoundUp(used_, kAlignment);
    if (begin > capacity_ || bytes > capacity_ - begin) return nullptr;
    used_ = begin + bytes;
    return begin_ + begin;
  }

 private:
  std::size_t mapped_bytes_;
  void* mapped_ = nullptr;
  uint8_t* begin_ = nullptr;
  std::size_t capacity_ = 0;
  std::size_t used_ = 0;
};

#endif

}  // namespace

bool HugePagesWanted() {
  const char* value = std::getenv(kVariable);  // NOLINT(concurrency-mt-unsafe)
  const std::string text = value == nullptr ? "" : value;
  if (text.empty() || text == "0") return false;
  if (text == "1") return true;
  throw InvalidArgument(std::string(kVariable) + "=" + text +
                        " is neither 0 (weights stay where they are) nor 1 (weights are copied "
                        "into 2 MiB pages)");
}

#ifdef __linux__

std::shared_ptr<const uint8_t> CopyToHugePages(const void* data, std::size_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<Region> last;  // the one with room
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Region> region = last.lock();
  uint8_t* copy = region == nullptr ? nullptr : region->Take(bytes);
  if (copy == nullptr) {
    region = std::make_shared<Region>(std::max(bytes, kRegionBytes));
    last = region;
    copy = region->Take(bytes);
  }
  std::memcpy(copy, data, bytes);
  return {region, copy};
}

#else

std::shared_ptr<const uint8_t> CopyToHugePages(const void*, std::size_t) {
  throw std::runtime_error(std::string(kVariable) + "=1 works on Linux only; unset " + kVariable);
}

#endif

}  // namespace bivlm::ort
