#include "scratch.h"

#include <mutex>
#include <new>
#include <utility>

namespace bivlm {
namespace {

constexpr std::align_val_t kAlignment{64};

// A larger piece than asked for would hide writes behind its end from AddressSanitizer.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeeps = false;
#elif defined(__has_feature)
constexpr bool kKeeps = !__has_feature(address_sanitizer);
#else
constexpr bool kKeeps = true;
#endif

struct Kept {
  std::mutex mutex;
  std::byte* data = nullptr;
  std::size_t bytes = 0;
};

// Never destroyed: threads may still run when the process exits.
Kept& kept() {
  static Kept& instance = *new Kept;
  return instance;
}

}  // namespace

Scratch::Scratch(std::size_t bytes) : data_(nullptr), bytes_(bytes) {
  {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    if (kept().bytes >= bytes) {
      std::swap(data_, kept().data);
      bytes_ = kept().bytes;
      kept().bytes = 0;
    }
  }
  if (data_ == nullptr) data_ = static_cast<std::byte*>(::operator new(bytes, kAlignment));
}

Scratch::~Scratch() {
  if (kKeeps) {
    const std::lock_guard<std::mutex> lock(kept().mutex);
    if (bytes_ > kept().bytes) {
      std::swap(data_, kept().data);
      std::swap(bytes_, kept().bytes);
    }
  }
  ::operator delete(data_, kAlignment);
}

}  // namespace bivlm
