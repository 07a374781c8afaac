// Copies of weights in 2 MiB pages, for BIVLM_HUGE_PAGES=1.
#ifndef BIVLM_ORT_HUGE_PAGES_H_
#define BIVLM_ORT_HUGE_PAGES_H_

#include <cstddef>
#include <cstdint>
#include <memory>

namespace bivlm::ort {

// Whether BIVLM_HUGE_PAGES is 1; unset, "" or 0: it is not. Throws InvalidArgument for other
// values.
bool HugePagesWanted();

// A copy of `bytes` bytes (>= 1) that starts at a multiple of 64. Copies share pages, so that small
// ones do not take 2 MiB each; pages are freed with the last copy in them. May be called on several
// threads. Throws std::runtime_error with a sentence where the system has no huge pages to give, or
// no memory.
std::shared_ptr<const uint8_t> CopyToHugePages(const void* data, std::size_t bytes);

}  // namespace bivlm::ort

#endif  // BIVLM_ORT_HUGE_PAGES_H_
