// BinaryMatMul with the int8 matrix products of ARMv8.6: one SMMLA multiplies two rows of levels
// with two tokens, eight columns each. One token, which would leave half of it unused, takes the
// dot products of ARMv8.2.
//
// Eight columns of a row must lie side by side. They are the columns 4 s .. 4 s + 3 of a chunk and
// those 32 behind: these are the same step of two bytes of codes (of the first and the last 32
// columns), so that codes are zipped before they are unpacked, and `prepare` zips the activations.
#if !defined(__ARM_FEATURE_DOTPROD) || !defined(__ARM_FEATURE_MATMUL_INT8)
#error "compile this file with the flags that CMakeLists.txt gives to the i8mm kernels"
#endif

#include "neon/levels_neon.h"

namespace bivlm {
namespace {

// 32-bit lanes of the first and of the second half of a and b in turn.
template <typename Bytes>
Bytes ZipLow(Bytes a, Bytes b) {
  return (Bytes)vzip1q_s32((int32x4_t)a, (int32x4_t)b);
}
template <typename Bytes>
Bytes ZipHigh(Bytes a, Bytes b) {
  return (Bytes)vzip2q_s32((int32x4_t)a, (int32x4_t)b);
}

// The first and the second halves of a and b.
template <typename Vector>
Vector Firsts(Vector a, Vector b) {
  return (Vector)vtrn1q_s64((int64x2_t)a, (int64x2_t)b);
}
template <typename Vector>
Vector Seconds(Vector a, Vector b) {
  return (Vector)vtrn2q_s64((int64x2_t)a, (int64x2_t)b);
}

void PrepareInt8I8mm(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                     std::byte* prepared, float* work) {
  PrepareInt8Neon(args, row_begin, row_end, prepared, work);
  const BinaryMatMulWeight& weight = *args.weight;
  for (std::size_t r = row_begin; r < row_end; ++r, prepared += Int8RowBytes(weight)) {
    int8_t* q = Int8RowAt(weight, prepared).q;
    for (std::size_t chunk = 0; chunk < weight.chunks(); ++chunk, q += kChunkColumns) {
      const int8x16x4_t x = vld1q_s8_x4(q);
      vst1q_s8(q, ZipLow(x.val[0], x.val[2]));
      vst1q_s8(q + 16, ZipHigh(x.val[0], x.val[2]));
      vst1q_s8(q + 32, ZipLow(x.val[1], x.val[3]));
      vst1q_s8(q + 48, ZipHigh(x.val[1], x.val[3]));
    }
  }
}

struct I8mm : LevelsNeon {
  static constexpr std::size_t kDecodeTokens = 1;
  static constexpr std::size_t kTileTokens = 8;  // 16 accumulators

  template <bool is_pair, std::size_t tokens>
  static void Dot(const uint8_t* codes, const Codebook& codebook, const int8_t* const (&q)[tokens],
                  const int32_t (&q_sums)[tokens], Ints (&dots)[tokens]) {
    static_assert(tokens == 1);
    constexpr std::size_t kHalf = 8 / kSteps<is_pair>;  // bytes of codes in 32 columns
    Begin(codes);
    int32x4_t sums[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
#pragma GCC unroll 2
    for (std::size_t vector = 0; vector < kHalf; ++vector) {
      int8x16_t a[kSteps<is_pair>];
      int8x16_t b[kSteps<is_pair>];
      Levels<is_pair>(codebook, vld1q_u8(codes + 64 * vector), AllRows(), a);
      Levels<is_pair>(codebook, vld1q_u8(codes + 64 * (vector + kHalf)), AllRows(), b);
#pragma GCC unroll 4
      for (std::size_t i = 0; i < kSteps<is_pair>; i += 2) {
        const int8x16_t x = vld1q_s8(q[0] + 8 * (kSteps<is_pair> * vector + i));
        sums[0] = vdotq_laneq_s32(sums[0], a[i], x, 0);
        sums[1] = vdotq_laneq_s32(sums[1], b[i], x, 1);
        sums[0] = vdotq_laneq_s32(sums[0], a[i + 1], x, 2);
        sums[1] = vdotq_laneq_s32(sums[1], b[i + 1], x, 3);
      }
    }
    const Ints sum = sums[0] + sums[1];
    dots[0] = is_pair ? sum : Signed(sum, q_sums[0]);
    End(dots[0]);
  }

  // Unpacked, 128 bytes are the levels of the columns 4 s .. 4 s + 3 and of those 32 behind, row
  // after row.
  template <bool is_pair>
  static void Unpack(const uint8_t* codes, const Codebook (&codebooks)[4], uint8_t* unpacked) {
    constexpr std::size_t kHalf = 8 / kSteps<is_pair>;
    for (std::size_t vector = 0; vector < kHalf; ++vector) {
#pragma GCC unroll 4
      for (std::size_t part = 0; part < 4; ++part) {
        const uint8x16_t a = vld1q_u8(codes + 64 * vector + 16 * part);
        const uint8x16_t b = vld1q_u8(codes + 64 * (vector + kHalf) + 16 * part);
        int8x16_t low[kSteps<is_pair>];
        int8x16_t high[kSteps<is_pair>];
        Levels<is_pair>(codebooks[part], ZipLow(a, b), RowsOf(0, 0, 1, 1), low);
        Levels<is_pair>(codebooks[part], ZipHigh(a, b), RowsOf(2, 2, 3, 3), high);
#pragma GCC unroll 8
        for (std::size_t i = 0; i < kSteps<is_pair>; ++i) {
          uint8_t* to = unpacked + 128 * (kSteps<is_pair> * vector + i) + 32 * part;
          vst1q_u8(to, vreinterpretq_u8_s8(is_pair ? low[i] : SignOf(low[i])));
          vst1q_u8(to + 16, vreinterpretq_u8_s8(is_pair ? high[i] : SignOf(high[i])));
        }
      }
    }
  }

  template <bool is_pair, std::size_t tokens>
  static void DotUnpacked(const uint8_t* unpacked, const Codebook (&)[4], const Tile<tokens>& tile,
                          std::size_t chunk) {
    constexpr std::size_t kPairs = (tokens + 1) / 2;  // of tokens; the last may be one twice
    const int8_t* levels = reinterpret_cast<const int8_t*>(unpacked);
    for (std::size_t part = 0; part < 4; part += 2) {
      int32x4_t sums[kPairs][4];  // of pairs of tokens and of rows
#pragma GCC unroll 4
      for (auto& of_tokens : sums) {
#pragma GCC unroll 4
        for (int32x4_t& sum : of_tokens) sum = vdupq_n_s32(0);
      }
#pragma GCC unroll 1  // unrolled, g++ 12 spills
      for (std::size_t at = 0; at < kChunkColumns; at += 16) {
        const int8_t* row = levels + 16 * at + 32 * part;
        int8x16_t x[kPairs];
        int8x16_t y[kPairs];
#pragma GCC unroll 4
        for (std::size_t p = 0; p < kPairs; ++p) {
          const std::size_t last = std::min(2 * p + 1, tokens - 1);
          const int8x16_t a = vld1q_s8(tile.rows[2 * p].q + chunk * kChunkColumns + at);
          const int8x16_t b = vld1q_s8(tile.rows[last].q + chunk * kChunkColumns + at);
          x[p] = Firsts(a, b);
          y[p] = Seconds(a, b);
        }
        AddStep(row, x, sums);
        AddStep(row + 128, y, sums);
      }
#pragma GCC unroll 4
      for (std::size_t p = 0; p < kPairs; ++p) {
#pragma GCC unroll 2
        for (std::size_t i = 0; i < 2; ++i) {
          const int32x4_t a = sums[p][2 * i];
          const int32x4_t b = sums[p][2 * i + 1];
          float* partial = tile.partial + 2 * p * kPanelRows + (part + i) * kLanes;
          AddDots<Vectors>(Firsts(a, b), tile.rows[2 * p].scale[chunk], partial);
          if (2 * p + 1 == tokens) continue;
          AddDots<Vectors>(Seconds(a, b), tile.rows[2 * p + 1].scale[chunk], partial + kPanelRows);
        }
      }
    }
  }

  // Adds the products of eight columns of eight rows with pairs of tokens.
  template <std::size_t pairs>
  static void AddStep(const int8_t* levels, const int8x16_t (&x)[pairs],
                      int32x4_t (&sums)[pairs][4]) {
#pragma GCC unroll 4
    for (std::size_t rows = 0; rows < 4; ++rows) {
      const int8x16_t two = vld1q_s8(levels + 16 * rows);
#pragma GCC unroll 4
      for (std::size_t p = 0; p < pairs; ++p) {
        sums[p][rows] = vmmlaq_s32(sums[p][rows], x[p], two);
      }
    }
  }
};

}  // namespace

const BinaryMatMulFunctions BinaryMatMulI8mm = {1U << 18, Int8RowBytes, PrepareInt8I8mm,
                                                MultiplyInt8<I8mm>};

}  // namespace bivlm
