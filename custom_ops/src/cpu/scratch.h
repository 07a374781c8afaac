// Memory of a driver for the time of one product.
#ifndef BIVLM_CPU_SCRATCH_H_
#define BIVLM_CPU_SCRATCH_H_

#include <cstddef>
#include <memory>
#include <new>

namespace bivlm {

inline constexpr std::size_t kScratchAlignment = 64;

struct ScratchDelete {
  void operator()(std::byte* memory) const {
    ::operator delete(memory, std::align_val_t{kScratchAlignment});
  }
};
using Scratch = std::unique_ptr<std::byte, ScratchDelete>;

inline Scratch AllocateScratch(std::size_t bytes) {
  return Scratch(
      static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kScratchAlignment})));
}

inline std::size_t CeilDivide(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

}  // namespace bivlm

#endif  // BIVLM_CPU_SCRATCH_H_
