// Indices of tables in packed codes, which the lookup kernels for few and for many tokens share.
//
// Everything here is in an anonymous namespace for the reason given in bivlm/float16.h.
#ifndef BIVLM_CPU_AVX512VBMI_NIBBLES_H_
#define BIVLM_CPU_AVX512VBMI_NIBBLES_H_

#include "avx512/binary_matmul_avx512.h"

namespace bivlm {
namespace {

// Where the sums of a byte's low and of its high nibble are in a table of 64.
struct Indices {
  __m512i low;
  __m512i high;
};

inline Indices NibbleIndices(__m512i bytes) {
  const __m512i groups = _mm512_set1_epi32(0x30201000);  // e
  const __m512i high = _mm512_srli_epi16(bytes, 4);
  return {Index(bytes, 0x0F, groups), Index(high, 0x0F, groups)};
}

// Bits 0, 2, 4, 6 (the first plane of a pair) to the low nibble of each byte, 1, 3, 5, 7 to the
// high one.
inline __m512i SplitPlanes(__m512i codes) {
  return _mm512_gf2p8affine_epi64_epi8(codes, _mm512_set1_epi64(0x0104104002082080), 0);
}

}  // namespace
}  // namespace bivlm

#endif  // BIVLM_CPU_AVX512VBMI_NIBBLES_H_
