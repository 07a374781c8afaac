// The transform of activations and their rounding to int8, with AVX-512.
#include <algorithm>
#include <cfloat>
#include <limits>

#include "int8_rows.h"
#include "transform_avx512.h"

namespace bivlm {
namespace {

// Rounds one chunk of v. Returns whether it is finite.
bool QuantizeChunk(const BinaryMatMulWeight& weight, const float* u, std::size_t chunk,
                   const Int8Row& row) {
  __m512 v[4];
  __m512i magnitude = _mm512_setzero_si512();
  for (std::size_t i = 0; i < 4; ++i) {
    v[i] = Ordered(weight, u, chunk * kChunkColumns + i * kLanes);
    const __m512i bits = _mm512_castps_si512(_mm512_abs_ps(v[i]));
    magnitude = _mm512_max_epu32(magnitude, bits);
  }
  const uint32_t largest = _mm512_reduce_max_epu32(magnitude);
  const float scale = FloatFromBits(largest) / 127.0F;
  const bool is_normal = largest < kInfinityBits && scale >= FLT_MIN;
  const __m512 divisor = _mm512_set1_ps(is_normal ? scale : std::numeric_limits<float>::infinity());
  __m512i sum = _mm512_setzero_si512();
  for (std::size_t i = 0; i < 4; ++i) {
    const __mmask16 normal = is_normal ? 0xFFFF : 0;
    const __m512i q = _mm512_maskz_cvtps_epi32(normal, _mm512_div_ps(v[i], divisor));
    sum = _mm512_add_epi32(sum, q);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row.q + chunk * kChunkColumns + i * kLanes),
                     _mm512_cvtepi32_epi8(q));
  }
  row.scale[chunk] = is_normal ? scale : 0.0F;
  row.sum[chunk] = _mm512_reduce_add_epi32(sum);
  return largest < kInfinityBits;
}

}  // namespace

void PrepareInt8Avx512(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                       std::byte* prepared, float* work) {
  const BinaryMatMulWeight& weight = *args.weight;
  for (std::size_t r = row_begin; r < row_end; ++r, prepared += Int8RowBytes(weight)) {
    const Int8Row row = Int8RowAt(weight, prepared);
    LoadRow(args, r, work);
    if (weight.hadamard_block > 0) SignedHadamard(weight, work);
    bool is_finite = true;
    for (std::size_t chunk = 0; chunk < weight.chunks(); ++chunk) {
      is_finite = QuantizeChunk(weight, work, chunk, row) && is_finite;
    }
    if (is_finite) continue;
    std::fill(row.scale, row.scale + weight.chunks(), std::numeric_limits<float>::quiet_NaN());
  }
}

}  // namespace bivlm
