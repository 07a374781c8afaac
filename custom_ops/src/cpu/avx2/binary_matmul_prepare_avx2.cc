// The transform of activations and their rounding to int8, with AVX2.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx2 kernels"
#endif

#include <immintrin.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#include "int8_rows.h"

namespace bivlm {
namespace {

constexpr std::size_t kLanes = 8;

// u (k_padded) = one row of x, padded with zeros.
void LoadRow(const BinaryMatMulArgs& args, std::size_t row, float* u) {
  const std::size_t k = args.weight->k;
  if (args.type == ElementType::kFloat32) {
    std::memcpy(u, static_cast<const float*>(args.x) + row * k, k * sizeof(float));
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(args.x) + row * k;
    std::size_t j = 0;
    for (; j + kLanes <= k; j += kLanes) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + j));
      _mm256_storeu_ps(u + j, _mm256_cvtph_ps(half));
    }
    for (; j < k; ++j) u[j] = _cvtsh_ss(x[j]);
  }
  std::fill(u + k, u + args.weight->k_padded, 0.0F);
}

// The butterfly between lanes that differ in one bit: `other` holds the partner of each lane of v,
// `minus` the lanes whose bit is set.
template <int minus>
__m256 Butterfly(__m256 v, __m256 other) {
  return _mm256_blend_ps(_mm256_add_ps(v, other), _mm256_sub_ps(other, v), minus);
}

__m256 HadamardInLanes(__m256 v) {
  v = Butterfly<0xAA>(v, _mm256_permute_ps(v, 0xB1));
  v = Butterfly<0xCC>(v, _mm256_permute_ps(v, 0x4E));
  return Butterfly<0xF0>(v, _mm256_permute2f128_ps(v, v, 1));
}

// `factor` with the signs of 8 channels: + where the bit is 1.
__m256 SignedFactor(unsigned bits, __m256 factor) {
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i clear = _mm256_andnot_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane_bit);
  const __m256i is_minus = _mm256_cmpeq_epi32(clear, lane_bit);
  return _mm256_xor_ps(factor, _mm256_castsi256_ps(_mm256_slli_epi32(is_minus, 31)));
}

// u = H diag(signs) u / sqrt(block) for every block.
void SignedHadamard(const BinaryMatMulWeight& weight, float* u) {
  const std::size_t block = weight.hadamard_block;
  const __m256 factor = _mm256_set1_ps(1.0F / std::sqrt(static_cast<float>(block)));
  for (std::size_t start = 0; start < weight.k_padded; start += block) {
    for (std::size_t j = start; j < start + block; j += kLanes) {
      const unsigned bits = weight.signs == nullptr ? 0xFFU : weight.signs[j / 8];
      const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(u + j), SignedFactor(bits, factor));
      _mm256_storeu_ps(u + j, HadamardInLanes(v));
    }
    for (std::size_t half = kLanes; half < block; half *= 2) {
      for (std::size_t j = start; j < start + block; j += 2 * half) {
        for (std::size_t i = j; i < j + half; i += kLanes) {
          const __m256 a = _mm256_loadu_ps(u + i);
          const __m256 b = _mm256_loadu_ps(u + i + half);
          _mm256_storeu_ps(u + i, _mm256_add_ps(a, b));
          _mm256_storeu_ps(u + i + half, _mm256_sub_ps(a, b));
        }
      }
    }
  }
}

// 8 channels of v, from column j on.
__m256 Ordered(const BinaryMatMulWeight& weight, const float* u, std::size_t j) {
  if (weight.order == nullptr) return _mm256_loadu_ps(u + j);
  if (weight.order_has_chunks) {
    uint16_t chunk = 0;
    std::memcpy(&chunk, weight.order + 2 * (j / kChunkColumns), sizeof(chunk));
    return _mm256_loadu_ps(u + chunk * kChunkColumns + j % kChunkColumns);
  }
  const __m128i columns = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight.order + 2 * j));
  return _mm256_i32gather_ps(u, _mm256_cvtepu16_epi32(columns), sizeof(float));
}

uint32_t LargestLane(__m256i v) {
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

int32_t SumOfLanes(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1));
  return _mm_cvtsi128_si32(s);
}

// Rounds one chunk of v. Returns whether it is finite.
bool QuantizeChunk(const BinaryMatMulWeight& weight, const float* u, std::size_t chunk,
                   const Int8Row& row) {
  __m256 v[8];
  __m256i magnitude = _mm256_setzero_si256();
  for (std::size_t i = 0; i < 8; ++i) {
    v[i] = Ordered(weight, u, chunk * kChunkColumns + i * kLanes);
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(v[i]), _mm256_set1_epi32(0x7FFFFFFF));
    magnitude = _mm256_max_epu32(magnitude, bits);
  }
  const uint32_t largest = LargestLane(magnitude);
  const float scale = FloatFromBits(largest) / 127.0F;
  int8_t* q = row.q + chunk * kChunkColumns;
  if (largest >= kInfinityBits || scale < FLT_MIN) {
    std::memset(q, 0, kChunkColumns);
    row.scale[chunk] = 0.0F;
    row.sum[chunk] = 0;
    return largest < kInfinityBits;
  }
  const __m256 divisor = _mm256_set1_ps(scale);
  __m256i sum = _mm256_setzero_si256();
  for (std::size_t i = 0; i < 8; i += 4) {
    __m256i r[4];
    for (std::size_t part = 0; part < 4; ++part) {
      r[part] = _mm256_cvtps_epi32(_mm256_div_ps(v[i + part], divisor));
      sum = _mm256_add_epi32(sum, r[part]);
    }
    // The packs work inside 128-bit halves; the permutation puts the groups of four in order.
    const __m256i packed =
        _mm256_packs_epi16(_mm256_packs_epi32(r[0], r[1]), _mm256_packs_epi32(r[2], r[3]));
    const __m256i ordered =
        _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i * kLanes), ordered);
  }
  row.scale[chunk] = scale;
  row.sum[chunk] = SumOfLanes(sum);
  return true;
}

}  // namespace

void PrepareInt8Avx2(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
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
