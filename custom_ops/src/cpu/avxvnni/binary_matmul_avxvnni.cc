// BinaryMatMul with AVX-VNNI: int8 levels times int8 activations, with 256-bit vectors.
//
// A 32-bit lane is a row of the panel; its four bytes are four neighbouring columns of one
// vpdpbusd. The instruction wants one unsigned side: levels are stored with 128 added (single
// blocks: 1 added), and -128 (-1) times the sum of the activations starts the accumulators.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__) || !defined(__AVXVNNI__)
#error "compile this file with the flags that CMakeLists.txt gives to the avxvnni kernels"
#endif

#include "avx2/int8_bytes.h"

namespace bivlm {
namespace {

__m256i AddProducts(__m256i sum, __m256i levels, __m256i x) {
  sum = _mm256_dpbusd_avx_epi32(sum, levels, x);
  KeepInRegister(sum);
  return sum;
}

// (bits & mask) | rows
__m256i Index(__m256i bits, int8_t mask, __m256i rows) {
  return _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi8(mask)), rows);
}

struct AvxVnni : Vectors {
  static constexpr std::size_t kDecodeTokens = 4;
  static constexpr std::size_t kTileTokens = 6;  // 12 accumulators

  // vpshufb looks up among the 16 bytes of 4 rows. Codes at bits 0 and 1 of a byte leave bits 2 and
  // 3 to the row; codes at bits 2 and 3 are looked up in the other table and need no shift.
  struct Codebook {
    __m256i by_row;   // pairs: byte 4 r + c of a quarter = level of code c in row r, + 128
    __m256i by_code;  // pairs: the same at byte 4 c + r
    __m256 scale;     // pairs: step; single blocks: alpha
  };

  static Codebook MakeCodebook(const BinaryMatMulStream& stream, const uint8_t* coefficients,
                               std::size_t half) {
    if (!stream.is_pair) {
      return {_mm256_setzero_si256(), _mm256_setzero_si256(),
              Coefficients<Vectors>(coefficients, stream.coefficient_slot, half)};
    }
    const PairLevels<Vectors> levels(stream, coefficients, half);
    const __m256i q1 = (__m256i)levels.q1;
    const __m256i q3 = (__m256i)levels.q3;
    const __m256i bias = _mm256_set1_epi32(128);
    const __m256i u0 = _mm256_sub_epi32(bias, q3);
    const __m256i u1 = _mm256_slli_epi32(_mm256_add_epi32(bias, q1), 8);
    const __m256i u2 = _mm256_slli_epi32(_mm256_sub_epi32(bias, q1), 16);
    const __m256i u3 = _mm256_slli_epi32(_mm256_add_epi32(bias, q3), 24);
    const __m256i by_row = _mm256_or_si256(_mm256_or_si256(u0, u1), _mm256_or_si256(u2, u3));
    const __m256i transpose = _mm256_setr_epi32(0x0C080400, 0x0D090501, 0x0E0A0602, 0x0F0B0703,
                                                0x0C080400, 0x0D090501, 0x0E0A0602, 0x0F0B0703);
    return {by_row, _mm256_shuffle_epi8(by_row, transpose), levels.step};
  }

  template <bool is_pair>
  static constexpr std::size_t kSteps = is_pair ? 4 : 8;  // of four columns, in a vector of codes

  // The biased levels of step i, from a vector of codes and the same shifted right by 4.
  template <bool is_pair>
  static __m256i Levels(const Codebook& codebook, __m256i low, __m256i high, std::size_t i) {
    if constexpr (is_pair) {
      const __m256i row_high = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0C0C0C0C, 0,
                                                 0x04040404, 0x08080808, 0x0C0C0C0C);
      const __m256i row_low = _mm256_setr_epi32(0, 0x01010101, 0x02020202, 0x03030303, 0,
                                                0x01010101, 0x02020202, 0x03030303);
      const __m256i bits = i < 2 ? low : high;
      return i % 2 == 0 ? _mm256_shuffle_epi8(codebook.by_row, Index(bits, 0x03, row_high))
                        : _mm256_shuffle_epi8(codebook.by_code, Index(bits, 0x0C, row_low));
    } else {
      // A bit moved to bit 1 is the level + 1.
      const int right = static_cast<int>(i) - 1;
      const __m256i shifted = i == 0 ? _mm256_slli_epi16(low, 1) : _mm256_srli_epi16(low, right);
      return _mm256_and_si256(shifted, _mm256_set1_epi8(2));
    }
  }

  template <bool is_pair>
  static __m256i Start(int32_t q_sum) {
    return _mm256_set1_epi32(is_pair ? -128 * q_sum : -q_sum);
  }

  template <bool is_pair, std::size_t tokens>
  static void Dot(const uint8_t* codes, const Codebook& codebook, const int8_t* const (&q)[tokens],
                  const int32_t (&q_sums)[tokens], Ints (&dots)[tokens]) {
    if constexpr (tokens == 1 && !is_pair) {
      dots[0] = (Ints)DotSingleOfOne(codes, q[0], q_sums[0]);
    } else {
      // With few tokens, several accumulators per token hide the latency of vpdpbusd.
      constexpr std::size_t kSums = tokens <= 2 ? 2 : 1;
      __m256i parts[tokens][kSums];
#pragma GCC unroll 4
      for (std::size_t t = 0; t < tokens; ++t) {
        parts[t][0] = Start<is_pair>(q_sums[t]);
        if constexpr (kSums == 2) parts[t][1] = _mm256_setzero_si256();
      }
#pragma GCC unroll 4
      for (std::size_t vector = 0; vector < 16 / kSteps<is_pair>; ++vector) {
        const __m256i low = Load(codes + 64 * vector);
        const __m256i high = _mm256_srli_epi16(low, 4);
#pragma GCC unroll 8
        for (std::size_t i = 0; i < kSteps<is_pair>; ++i) {
          const __m256i levels = Levels<is_pair>(codebook, low, high, i);
#pragma GCC unroll 4
          for (std::size_t t = 0; t < tokens; ++t) {
            parts[t][i % kSums] =
                AddProducts(parts[t][i % kSums], levels,
                            BroadcastFour(q[t] + 4 * (kSteps<is_pair> * vector + i)));
          }
        }
      }
#pragma GCC unroll 4
      for (std::size_t t = 0; t < tokens; ++t) {
        dots[t] =
            (Ints)(kSums == 2 ? _mm256_add_epi32(parts[t][0], parts[t][kSums - 1]) : parts[t][0]);
      }
    }
  }

  // One token: bits 0 to 3 of a nibble stay where they are, count 1, 2, 4 or 8 times, and have sums
  // of their own.
  static __m256i DotSingleOfOne(const uint8_t* codes, const int8_t* q, int32_t q_sum) {
    __m256i parts[4];
#pragma GCC unroll 4
    for (__m256i& part : parts) part = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (std::size_t vector = 0; vector < 2; ++vector) {
      const __m256i low = Load(codes + 64 * vector);
      const __m256i high = _mm256_srli_epi16(low, 4);
#pragma GCC unroll 8
      for (std::size_t i = 0; i < 8; ++i) {
        const __m256i mask = _mm256_set1_epi8(static_cast<char>(1 << i % 4));
        parts[i % 4] = AddProducts(parts[i % 4], _mm256_and_si256(i < 4 ? low : high, mask),
                                   BroadcastFour(q + 32 * vector + 4 * i));
      }
    }
    const __m256i even = _mm256_add_epi32(parts[0], _mm256_srai_epi32(parts[2], 2));
    const __m256i odd =
        _mm256_add_epi32(_mm256_srai_epi32(parts[1], 1), _mm256_srai_epi32(parts[3], 3));
    return _mm256_sub_epi32(_mm256_slli_epi32(_mm256_add_epi32(even, odd), 1),
                            _mm256_set1_epi32(q_sum));
  }

  // Unpacked, 64 bytes are the biased levels of a step: 16 rows x 4 columns.
  template <bool is_pair>
  static constexpr std::size_t kUnpackedBytes = 1024;

  template <bool is_pair>
  static void Unpack(const uint8_t* codes, const Codebook (&codebooks)[kHalves],
                     uint8_t* unpacked) {
    for (std::size_t vector = 0; vector < 16 / kSteps<is_pair>; ++vector) {
      for (std::size_t half = 0; half < kHalves; ++half) {
        const __m256i low = Load(codes + 64 * vector + 32 * half);
        const __m256i high = _mm256_srli_epi16(low, 4);
#pragma GCC unroll 8
        for (std::size_t i = 0; i < kSteps<is_pair>; ++i) {
          Save(unpacked + 64 * (kSteps<is_pair> * vector + i) + 32 * half,
               Levels<is_pair>(codebooks[half], low, high, i));
        }
      }
    }
  }

  template <bool is_pair, std::size_t tokens>
  static void DotUnpacked(const uint8_t* unpacked, const Codebook (&)[kHalves],
                          const Tile<tokens>& tile, std::size_t chunk) {
    const int8_t* q[tokens];
    __m256i dots[tokens][kHalves];
#pragma GCC unroll 6
    for (std::size_t t = 0; t < tokens; ++t) {
      q[t] = tile.rows[t].q + chunk * kChunkColumns;
      dots[t][0] = Start<is_pair>(tile.rows[t].sum[chunk]);
      dots[t][1] = dots[t][0];
    }
    for (std::size_t step = 0; step < 16; ++step) {
      const __m256i first = Load(unpacked + 64 * step);
      const __m256i second = Load(unpacked + 64 * step + 32);
#pragma GCC unroll 6
      for (std::size_t t = 0; t < tokens; ++t) {
        const __m256i x = BroadcastFour(q[t] + 4 * step);
        dots[t][0] = AddProducts(dots[t][0], first, x);
        dots[t][1] = AddProducts(dots[t][1], second, x);
      }
    }
#pragma GCC unroll 6
    for (std::size_t t = 0; t < tokens; ++t) {
      const float scale = tile.rows[t].scale[chunk];
      AddDots<Vectors>((Ints)dots[t][0], scale, tile.partial + t * kPanelRows);
      AddDots<Vectors>((Ints)dots[t][1], scale, tile.partial + t * kPanelRows + kHalfRows);
    }
  }
};

}  // namespace

const BinaryMatMulFunctions BinaryMatMulAvxVnni = {1U << 19, Int8RowBytes, PrepareInt8Avx2,
                                                   MultiplyInt8<AvxVnni>};

}  // namespace bivlm
