// What the 256-bit int8 kernels of BinaryMatMul (avx2 and avxvnni) share beside multiply_int8.h.
#ifndef BIVLM_CPU_AVX2_INT8_BYTES_H_
#define BIVLM_CPU_AVX2_INT8_BYTES_H_

#include <immintrin.h>

#include <cstring>

#include "avx2/vectors_avx2.h"
#include "multiply_int8.h"

namespace bivlm {
namespace {

constexpr std::size_t kHalfRows = Vectors::kLanes;  // rows of a panel in one vector
constexpr std::size_t kHalves = kPanelRows / kHalfRows;

// Four neighbouring channels in every 32-bit lane.
inline __m256i BroadcastFour(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, sizeof(four));
  return _mm256_set1_epi32(four);
}

inline __m256i Load(const uint8_t* bytes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
}

inline void Save(uint8_t* bytes, __m256i v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), v);
}

// Has `v` in a register here: without it, g++ 12 computes the products of a whole tile before it
// adds them, and spills the accumulators (avx2, m = 256: 112 instead of 200 GFLOP/s on a Zen 5).
inline void KeepInRegister(__m256i& v) { asm volatile("" : "+x"(v)); }

}  // namespace
}  // namespace bivlm

#endif  // BIVLM_CPU_AVX2_INT8_BYTES_H_
