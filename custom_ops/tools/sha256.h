// SHA-256 (FIPS 180-4), for the checksums of a bundle.
#ifndef BIVLM_TOOLS_SHA256_H_
#define BIVLM_TOOLS_SHA256_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace bivlm::device {

class Sha256 {
 public:
  void Add(const void* data, std::size_t bytes);
  // The digest in hexadecimal; nothing can be added afterwards.
  std::string Hex();

 private:
  void Block(const uint8_t* block);

  std::array<uint32_t, 8> state_ = {0x6a09e667U, 0xbb67ae85U, 0x3c6ef372U, 0xa54ff53aU,
                                    0x510e527fU, 0x9b05688cU, 0x1f83d9abU, 0x5be0cd19U};
  std::array<uint8_t, 64> pending_{};
  std::size_t pending_bytes_ = 0;
  uint64_t total_bytes_ = 0;
};

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_SHA256_H_
