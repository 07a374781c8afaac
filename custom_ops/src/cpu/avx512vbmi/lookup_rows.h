// Rows of activations as the lookup kernel reads them.
//
// A prepared row holds, one after the other:
//   int8  tables[4 * k_padded]  for every 16 columns of v 64 bytes: byte 16 e + c is the sum of
//                               columns 4 i + e, i = 0..3, in units of the chunk's scale and
//                               rounded, each with the sign + where bit i of c is 1, else -
//   float scale[chunks]         0 where all sums are 0; NaN everywhere for a token with a NaN or an
//                               infinity
//
// The functions are static for the reason given in bivlm/float16.h.
#ifndef BIVLM_CPU_AVX512VBMI_LOOKUP_ROWS_H_
#define BIVLM_CPU_AVX512VBMI_LOOKUP_ROWS_H_

#include <cstddef>
#include <cstdint>

#include "bivlm/binary_matmul.h"

namespace bivlm {

inline constexpr std::size_t kTableColumns = 16;
inline constexpr std::size_t kTableBytes = 64;
inline constexpr std::size_t kChunkTableBytes = kChunkColumns / kTableColumns * kTableBytes;

struct LookupRow {
  int8_t* tables;
  float* scale;
};

static inline std::size_t LookupRowBytes(const BinaryMatMulWeight& weight) {
  const std::size_t bytes = (kChunkTableBytes + sizeof(float)) * weight.chunks();
  const std::size_t rounded = (bytes + 63) / 64 * 64;
  // Rows a multiple of 4096 bytes apart would compete for the same lines of the L1 cache.
  return rounded % 4096 == 0 ? rounded + 64 : rounded;
}

static inline LookupRow LookupRowAt(const BinaryMatMulWeight& weight, std::byte* row) {
  int8_t* tables = reinterpret_cast<int8_t*>(row);
  return {tables, reinterpret_cast<float*>(tables + kChunkTableBytes * weight.chunks())};
}

// BinaryMatMulFunctions::prepare of BinaryMatMulLookup.
void PrepareLookup(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                   std::byte* prepared, float* work);

// For at most kMaxLookupTokens tokens, which are one tile.
inline constexpr std::size_t kMaxLookupTokens = 4;
extern const BinaryMatMulFunctions BinaryMatMulLookup;

}  // namespace bivlm

#endif  // BIVLM_CPU_AVX512VBMI_LOOKUP_ROWS_H_
