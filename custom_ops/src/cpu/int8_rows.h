// Rows of activations as the int8 kernels of BinaryMatMul read them.
//
// A prepared row holds, one after the other:
//   int8  q[k_padded]    v / scale of its chunk, rounded
//   float scale[chunks]  0 where q is all 0; NaN everywhere for a token with a NaN or an infinity
//   int32 sum[chunks]    sum of q over the chunk
//
// The functions are static for the reason given in bivlm/float16.h.
#ifndef BIVLM_CPU_INT8_ROWS_H_
#define BIVLM_CPU_INT8_ROWS_H_

#include <cstddef>
#include <cstdint>

#include "bivlm/binary_matmul.h"

namespace bivlm {

struct Int8Row {
  int8_t* q;
  float* scale;
  int32_t* sum;
};

static inline std::size_t Int8RowBytes(const BinaryMatMulWeight& weight) {
  const std::size_t bytes = weight.k_padded + 8 * weight.chunks();
  const std::size_t rounded = (bytes + 63) / 64 * 64;
  // Rows a multiple of 4096 bytes apart would compete for the same lines of the L1 cache.
  return rounded % 4096 == 0 ? rounded + 64 : rounded;
}

static inline Int8Row Int8RowAt(const BinaryMatMulWeight& weight, std::byte* row) {
  int8_t* q = reinterpret_cast<int8_t*>(row);
  float* scale = reinterpret_cast<float*>(q + weight.k_padded);
  return {q, scale, reinterpret_cast<int32_t*>(scale + weight.chunks())};
}

// Bits of the largest |v| from which a chunk counts as not finite.
inline constexpr uint32_t kInfinityBits = 0x7f800000U;

// BinaryMatMulFunctions::prepare of the int8 kernels.
void PrepareInt8Avx2(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                     std::byte* prepared, float* work);
void PrepareInt8Neon(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                     std::byte* prepared, float* work);
void PrepareInt8Avx512(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                       std::byte* prepared, float* work);

}  // namespace bivlm

#endif  // BIVLM_CPU_INT8_ROWS_H_
