// Memory full of random bytes to read weights from, and the fastest plain read of it. Linux.
#ifndef BIVLM_BENCH_WEIGHT_MEMORY_H_
#define BIVLM_BENCH_WEIGHT_MEMORY_H_

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace bivlm::bench {

class WeightMemory {
 public:
  // Pages of a file in `directory`, mapped read-only as ONNX Runtime maps external data; the file
  // has no name any more. With `huge`, anonymous memory in pages of 2 MiB. Throws
  // std::runtime_error.
  WeightMemory(std::size_t bytes, bool huge, const std::string& directory)
      : bytes_((bytes + kHugePage - 1) / kHugePage * kHugePage) {
    if (huge) {
      MakeHuge();
    } else {
      MakeMapped(directory);
    }
  }
  WeightMemory(const WeightMemory&) = delete;
  WeightMemory& operator=(const WeightMemory&) = delete;
  ~WeightMemory() { munmap(mapping_, mapped_bytes_); }

  const uint8_t* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  static constexpr std::size_t kHugePage = std::size_t{2} << 20;

  static void Require(bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error(what + ": " + std::strerror(errno));
  }

  void MakeMapped(const std::string& directory) {
    std::string path = directory + "/binary_matmul_bench.XXXXXX";
    const int file = mkstemp(path.data());
    Require(file >= 0, "cannot write to " + directory + ", give another folder by --dir");
    unlink(path.c_str());
    std::mt19937_64 random(1);
    std::vector<uint64_t> block(kHugePage / sizeof(uint64_t));
    for (std::size_t done = 0; done < bytes_; done += kHugePage) {
      for (uint64_t& word : block) word = random();
      const bool written = write(file, block.data(), kHugePage) == static_cast<ssize_t>(kHugePage);
      if (!written) close(file);
      Require(written, "cannot write " + std::to_string(bytes_ >> 20) + " MiB to " + directory +
                           ", give another folder by --dir");
    }
    mapped_bytes_ = bytes_;
    mapping_ = mmap(nullptr, mapped_bytes_, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
    close(file);
    Require(mapping_ != MAP_FAILED, "cannot map the file of weights");
    data_ = static_cast<const uint8_t*>(mapping_);
  }

  void MakeHuge() {
    mapped_bytes_ = bytes_ + kHugePage;
    mapping_ =
        mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    Require(mapping_ != MAP_FAILED, "cannot get memory for the weights");
    const std::size_t past = reinterpret_cast<uintptr_t>(mapping_) % kHugePage;
    uint8_t* data = static_cast<uint8_t*>(mapping_) + (past == 0 ? 0 : kHugePage - past);
    Require(madvise(data, bytes_, MADV_HUGEPAGE) == 0, "the kernel gives no 2 MiB pages");
    std::mt19937_64 random(1);
    for (std::size_t i = 0; i < bytes_; i += sizeof(uint64_t)) {
      const uint64_t word = random();
      std::memcpy(data + i, &word, sizeof(word));
    }
    data_ = data;
    const std::size_t huge_bytes = HugeBytes();
    if (huge_bytes < bytes_ / 10 * 9) {
      throw std::runtime_error("only " + std::to_string(huge_bytes >> 20) + " of " +
                               std::to_string(bytes_ >> 20) +
                               " MiB came in 2 MiB pages: free some memory, or see "
                               "/sys/kernel/mm/transparent_hugepage/enabled");
    }
  }

  // Of this process.
  static std::size_t HugeBytes() {
    std::ifstream file("/proc/self/smaps_rollup");
    const std::string key = "AnonHugePages:";
    for (std::string line; std::getline(file, line);) {
      if (line.rfind(key, 0) == 0) return std::stoull(line.substr(key.size())) << 10;
    }
    return 0;
  }

  std::size_t bytes_;
  std::size_t mapped_bytes_ = 0;
  void* mapping_ = nullptr;
  const uint8_t* data_ = nullptr;
};

using WideVector = uint64_t __attribute__((vector_size(64), aligned(1), may_alias));

// Reads `bytes` bytes with the widest loads that this CPU has.
#if defined(__x86_64__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
inline uint64_t ReadAll(const uint8_t* data, std::size_t bytes) {
  constexpr std::size_t kSums = 8;
  WideVector sums[kSums] = {};
  std::size_t i = 0;
  for (; i + sizeof(sums) <= bytes; i += sizeof(sums)) {
#pragma GCC unroll 8
    for (std::size_t s = 0; s < kSums; ++s) {
      sums[s] ^= *reinterpret_cast<const WideVector*>(data + i + s * sizeof(WideVector));
    }
  }
  uint64_t total = 0;
  for (; i < bytes; ++i) total ^= data[i];
  for (const WideVector& sum : sums) {
    for (std::size_t lane = 0; lane < 8; ++lane) total ^= sum[lane];
  }
  return total;
}

}  // namespace bivlm::bench

#endif  // BIVLM_BENCH_WEIGHT_MEMORY_H_
