// BinaryMatMul with AVX2: int8 levels times int8 activations.
//
// A 32-bit lane is a row of the panel; its four bytes are four neighbouring columns. vpmaddubsw
// wants one unsigned side and saturates 16 bits, so that a level (up to 127) would need its sign
// moved to the activation and a widening after every product. The planes need neither: with bits
// b, c of planes p, p+1 and the levels q3 (both +1) and q1 (+1, -1) of a row,
//
//   2 level = (2 b - 1)(q3 + q1) + (2 c - 1)(q3 - q1)
//   sum of level * q = (q3 + q1) sum(b q) + (q3 - q1) sum(c q) - q3 sum(q),
//
// and sums of bits times int8 over a whole chunk fit 16 bits: 64 / 2 * 127 = 4064 per lane.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx2 kernels"
#endif

#include "avx2/int8_bytes.h"

namespace bivlm {
namespace {

__m256i And(__m256i v, int8_t mask) { return _mm256_and_si256(v, _mm256_set1_epi8(mask)); }

// sum + pairs of bits * x, bits being unsigned.
__m256i AddProducts(__m256i sum, __m256i bits, __m256i x) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(bits, x));
  KeepInRegister(sum);
  return sum;
}

struct Avx2 : Vectors {
  static constexpr std::size_t kDecodeTokens = 4;
  static constexpr std::size_t kTileTokens = 6;  // 12 accumulators

  struct Codebook {
    __m256i plane0;  // both 16-bit halves of a lane: q3 + q1; single blocks: 2
    __m256i plane1;  // q3 - q1
    __m256i all;     // low half of a lane: q3; single blocks: 1
    __m256 scale;    // pairs: step; single blocks: alpha
  };

  static Codebook MakeCodebook(const BinaryMatMulStream& stream, const uint8_t* coefficients,
                               std::size_t half) {
    if (!stream.is_pair) {
      return {_mm256_set1_epi16(2), _mm256_setzero_si256(), _mm256_set1_epi32(1),
              Coefficients<Vectors>(coefficients, stream.coefficient_slot, half)};
    }
    const PairLevels<Vectors> levels(stream, coefficients, half);
    const __m256i q1 = (__m256i)levels.q1;
    const __m256i q3 = (__m256i)levels.q3;
    const __m256i low = _mm256_set1_epi32(0xFFFF);
    const __m256i sum = _mm256_add_epi16(q3, q1);
    const __m256i difference = _mm256_sub_epi16(q3, q1);
    return {_mm256_blend_epi16(sum, _mm256_slli_epi32(sum, 16), 0xAA),
            _mm256_blend_epi16(difference, _mm256_slli_epi32(difference, 16), 0xAA),
            _mm256_and_si256(q3, low), levels.step};
  }

  // The dot products of a chunk from the 16-bit sums over the bits of its planes.
  template <bool is_pair>
  static __m256i Combine(const Codebook& codebook, __m256i bits0, __m256i bits1, int32_t q_sum) {
    const __m256i minus = _mm256_madd_epi16(codebook.all, _mm256_set1_epi32(q_sum));
    __m256i dots = _mm256_sub_epi32(_mm256_madd_epi16(bits0, codebook.plane0), minus);
    if constexpr (is_pair) {
      dots = _mm256_add_epi32(dots, _mm256_madd_epi16(bits1, codebook.plane1));
    }
    return dots;
  }

  template <bool is_pair, std::size_t tokens>
  static void Dot(const uint8_t* codes, const Codebook& codebook, const int8_t* const (&q)[tokens],
                  const int32_t (&q_sums)[tokens], Ints (&dots)[tokens]) {
    if constexpr (tokens == 1 && is_pair) {
      dots[0] = (Ints)DotPairOfOne(codes, codebook, q[0], q_sums[0]);
    } else if constexpr (tokens == 1) {
      dots[0] = (Ints)DotSingleOfOne(codes, codebook, q[0], q_sums[0]);
    } else {
      __m256i bits[tokens][2];
#pragma GCC unroll 4
      for (std::size_t t = 0; t < tokens; ++t) {
        bits[t][0] = _mm256_setzero_si256();
        bits[t][1] = _mm256_setzero_si256();
      }
      constexpr std::size_t kSteps = is_pair ? 4 : 8;
      for (std::size_t vector = 0; vector < 16 / kSteps; ++vector) {
        const __m256i bytes = Load(codes + 64 * vector);
#pragma GCC unroll 8
        for (std::size_t i = 0; i < kSteps; ++i) {
          const int shift = static_cast<int>(is_pair ? 2 * i : i);
          const __m256i plane0 = And(_mm256_srli_epi16(bytes, shift), 1);
          const __m256i plane1 = And(_mm256_srli_epi16(bytes, shift + 1), 1);
#pragma GCC unroll 4
          for (std::size_t t = 0; t < tokens; ++t) {
            const __m256i x = BroadcastFour(q[t] + 4 * (kSteps * vector + i));
            bits[t][0] = AddProducts(bits[t][0], plane0, x);
            if constexpr (is_pair) bits[t][1] = AddProducts(bits[t][1], plane1, x);
          }
        }
      }
#pragma GCC unroll 4
      for (std::size_t t = 0; t < tokens; ++t) {
        dots[t] = (Ints)Combine<is_pair>(codebook, bits[t][0], bits[t][1], q_sums[t]);
      }
    }
  }

  // One token: bits 0 to 3 of a nibble stay where they are, count 1, 2, 4 or 8 times, and have sums
  // of their own. The largest, 8 * 8 * 2 * 127, fits 16 bits.
  static __m256i DotPairOfOne(const uint8_t* codes, const Codebook& codebook, const int8_t* q,
                              int32_t q_sum) {
    __m256i sums[4];
#pragma GCC unroll 4
    for (__m256i& sum : sums) sum = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (std::size_t vector = 0; vector < 4; ++vector) {
      const __m256i low = Load(codes + 64 * vector);
      const __m256i high = _mm256_srli_epi16(low, 4);
#pragma GCC unroll 4
      for (std::size_t i = 0; i < 4; ++i) {
        const __m256i bytes = i < 2 ? low : high;
        const __m256i x = BroadcastFour(q + 16 * vector + 4 * i);
        const std::size_t first = i % 2 == 0 ? 0 : 2;
        sums[first] = AddProducts(sums[first], And(bytes, i % 2 == 0 ? 1 : 4), x);
        sums[first + 1] = AddProducts(sums[first + 1], And(bytes, i % 2 == 0 ? 2 : 8), x);
      }
    }
    const __m256i bits0 = _mm256_add_epi16(sums[0], _mm256_srai_epi16(sums[2], 2));
    const __m256i bits1 =
        _mm256_add_epi16(_mm256_srai_epi16(sums[1], 1), _mm256_srai_epi16(sums[3], 3));
    return Combine<true>(codebook, bits0, bits1, q_sum);
  }

  static __m256i DotSingleOfOne(const uint8_t* codes, const Codebook& codebook, const int8_t* q,
                                int32_t q_sum) {
    __m256i sums[4];
#pragma GCC unroll 4
    for (__m256i& sum : sums) sum = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (std::size_t vector = 0; vector < 2; ++vector) {
      const __m256i low = Load(codes + 64 * vector);
      const __m256i high = _mm256_srli_epi16(low, 4);
#pragma GCC unroll 8
      for (std::size_t i = 0; i < 8; ++i) {
        const __m256i x = BroadcastFour(q + 32 * vector + 4 * i);
        const __m256i bit = And(i < 4 ? low : high, static_cast<int8_t>(1 << i % 4));
        sums[i % 4] = AddProducts(sums[i % 4], bit, x);
      }
    }
    const __m256i even = _mm256_add_epi16(sums[0], _mm256_srai_epi16(sums[2], 2));
    const __m256i odd =
        _mm256_add_epi16(_mm256_srai_epi16(sums[1], 1), _mm256_srai_epi16(sums[3], 3));
    return Combine<false>(codebook, _mm256_add_epi16(even, odd), odd, q_sum);
  }

  // Unpacked, every bit is a byte, and 64 bytes are a step of four columns: (half, step, plane, 32)
  // of a pair block, (step, half, 32) of a single one.
  template <bool is_pair>
  static constexpr std::size_t kUnpackedBytes = is_pair ? 2048 : 1024;

  template <bool is_pair>
  static void Unpack(const uint8_t* codes, const Codebook (&)[kHalves], uint8_t* unpacked) {
    for (std::size_t vector = 0; vector < (is_pair ? 4 : 2); ++vector) {
      for (std::size_t half = 0; half < kHalves; ++half) {
        const __m256i bytes = Load(codes + 64 * vector + 32 * half);
#pragma GCC unroll 8
        for (std::size_t bit = 0; bit < 8; ++bit) {
          const std::size_t at =
              is_pair ? 1024 * half + 256 * vector + 32 * bit : 512 * vector + 64 * bit + 32 * half;
          Save(unpacked + at, And(_mm256_srli_epi16(bytes, static_cast<int>(bit)), 1));
        }
      }
    }
  }

  // The sums of bits times q over the 16 steps of a chunk, for the two vectors of a step.
  template <std::size_t tokens>
  static void SumBits(const uint8_t* unpacked, const int8_t* const (&q)[tokens],
                      __m256i (&sums)[tokens][2]) {
#pragma GCC unroll 6
    for (std::size_t t = 0; t < tokens; ++t) {
      sums[t][0] = _mm256_setzero_si256();
      sums[t][1] = _mm256_setzero_si256();
    }
    for (std::size_t step = 0; step < 16; ++step) {
      const __m256i first = Load(unpacked + 64 * step);
      const __m256i second = Load(unpacked + 64 * step + 32);
#pragma GCC unroll 6
      for (std::size_t t = 0; t < tokens; ++t) {
        const __m256i x = BroadcastFour(q[t] + 4 * step);
        sums[t][0] = AddProducts(sums[t][0], first, x);
        sums[t][1] = AddProducts(sums[t][1], second, x);
      }
    }
  }

  template <bool is_pair, std::size_t tokens>
  static void DotUnpacked(const uint8_t* unpacked, const Codebook (&codebooks)[kHalves],
                          const Tile<tokens>& tile, std::size_t chunk) {
    const int8_t* q[tokens];
#pragma GCC unroll 6
    for (std::size_t t = 0; t < tokens; ++t) q[t] = tile.rows[t].q + chunk * kChunkColumns;
    __m256i sums[tokens][2];
    if constexpr (!is_pair) SumBits<tokens>(unpacked, q, sums);
    for (std::size_t half = 0; half < kHalves; ++half) {
      if constexpr (is_pair) SumBits<tokens>(unpacked + 1024 * half, q, sums);
#pragma GCC unroll 6
      for (std::size_t t = 0; t < tokens; ++t) {
        const __m256i dots = Combine<is_pair>(codebooks[half], is_pair ? sums[t][0] : sums[t][half],
                                              sums[t][1], tile.rows[t].sum[chunk]);
        AddDots<Vectors>((Ints)dots, tile.rows[t].scale[chunk],
                         tile.partial + t * kPanelRows + half * kHalfRows);
      }
    }
  }
};

}  // namespace

const BinaryMatMulFunctions BinaryMatMulAvx2 = {1U << 18, Int8RowBytes, PrepareInt8Avx2,
                                                MultiplyInt8<Avx2>};

}  // namespace bivlm
