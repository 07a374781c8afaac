// Work space of an operator for the time of one call.
#ifndef BIVLM_CPU_SCRATCH_H_
#define BIVLM_CPU_SCRATCH_H_

#include <cstddef>

namespace bivlm {

// Memory that starts a cache line, its contents undefined. The largest piece that was given back
// stays for the next call: a prompt asks for megabytes at every product, and to get each from the
// system anew, page by page, took a twentieth of its time.
class Scratch {
 public:
  // Throws std::bad_alloc.
  explicit Scratch(std::size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  std::byte* data() const { return data_; }

 private:
  std::byte* data_;
  std::size_t bytes_;
};

}  // namespace bivlm

#endif  // BIVLM_CPU_SCRATCH_H_
