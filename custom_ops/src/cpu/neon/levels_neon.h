// From codes to int8 levels, for the NEON kernels of BinaryMatMul (neon, dotprod and i8mm).
//
// 16 bytes of codes are four rows (a part of a panel); each 32-bit lane is a row, its bytes four
// neighbouring columns. They hold the codes of 4 steps of four columns (pair blocks) or of 8
// (single blocks), and become one vector of levels per step.
#ifndef BIVLM_CPU_NEON_LEVELS_NEON_H_
#define BIVLM_CPU_NEON_LEVELS_NEON_H_

#include "multiply_int8.h"
#include "neon/vectors_neon.h"

namespace bivlm {
namespace {

struct LevelsNeon : Vectors {
  // TBL looks up among the 16 bytes of four rows. An index has two bits of code and two of row: a
  // code at bits 0 and 1 leaves bits 2 and 3 to the row, a code at bits 2 and 3 is looked up in the
  // other table and needs no shift.
  struct Codebook {
    int8x16_t by_row;   // pairs: byte 4 r + c = level of code c in row r
    int8x16_t by_code;  // pairs: the same at byte 4 c + r
    Vec scale;          // pairs: step; single blocks: alpha
  };

  static Codebook MakeCodebook(const BinaryMatMulStream& stream, const uint8_t* coefficients,
                               std::size_t part) {
    if (!stream.is_pair) {
      return {vdupq_n_s8(0), vdupq_n_s8(0),
              Coefficients<Vectors>(coefficients, stream.coefficient_slot, part)};
    }
    const PairLevels<Vectors> levels(stream, coefficients, part);
    const int16x4_t q1 = vmovn_s32(levels.q1);
    const int16x4_t q3 = vmovn_s32(levels.q3);
    const int8x8_t low = vmovn_s16(vcombine_s16(vneg_s16(q3), q1));
    const int8x8_t high = vmovn_s16(vcombine_s16(vneg_s16(q1), q3));
    const int8x16_t by_code = vcombine_s8(low, high);
    const uint8x16_t transpose = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    return {vqtbl1q_s8(by_code, transpose), by_code, levels.step};
  }

  template <bool is_pair>
  static constexpr std::size_t kSteps = is_pair ? 4 : 8;  // in a byte of codes

  // levels[i] of step i. `rows` has 0x11 times the row of the part, 0 to 3, in every byte of a
  // lane. The levels of single blocks are -1 where the bit is 1, else 0.
  template <bool is_pair>
  static void Levels(const Codebook& codebook, uint8x16_t codes, uint8x16_t rows,
                     int8x16_t (&levels)[kSteps<is_pair>]) {
    if constexpr (is_pair) {
      // Steps 0 and 2 of a byte, then 1 and 3, with the row in the bits of the other two. Selected
      // and not ANDed and ORed, which g++ 12 would do over again for each look-up.
      const uint8x16_t first = vdupq_n_u8(0x33);
      const uint8x16_t even = vbslq_u8(first, codes, vshlq_n_u8(rows, 2));
      const uint8x16_t odd = vbslq_u8(first, rows, codes);
      const uint8x16_t low = vdupq_n_u8(0x0F);
      levels[0] = vqtbl1q_s8(codebook.by_row, vandq_u8(even, low));
      levels[1] = vqtbl1q_s8(codebook.by_code, vandq_u8(odd, low));
      levels[2] = vqtbl1q_s8(codebook.by_row, vshrq_n_u8(even, 4));
      levels[3] = vqtbl1q_s8(codebook.by_code, vshrq_n_u8(odd, 4));
    } else {
#pragma GCC unroll 8
      for (std::size_t i = 0; i < 8; ++i) {
        const uint8x16_t bit = vdupq_n_u8(static_cast<uint8_t>(1U << i));
        levels[i] = vreinterpretq_s8_u8(vtstq_u8(codes, bit));
      }
    }
  }

  // Orders the work on parts of a panel, with Begin before and End behind each: else g++ 12 reads
  // the codes of all parts first, and spills them.
  static void Begin(const uint8_t*& codes) { asm volatile("" : "+r"(codes)); }
  static void End(Ints& dots) { asm volatile("" : "+w"(dots)); }

  // 0x11 times a row in each lane.
  static uint8x16_t RowsOf(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const Bits rows = {a, b, c, d};
    return vreinterpretq_u8_u32(rows * 0x11111111U);
  }
  static uint8x16_t AllRows() { return RowsOf(0, 1, 2, 3); }

  // The levels of a single block as +-1, the sign of the weight.
  static int8x16_t SignOf(int8x16_t minus_bit) {
    return vsubq_s8(vdupq_n_s8(-1), vaddq_s8(minus_bit, minus_bit));
  }

  // The product of a single block from that of its bits, counted as -1.
  static Ints Signed(Ints minus_bits, int32_t q_sum) { return -(minus_bits + minus_bits) - q_sum; }

  // Unpacked, 64 bytes are the levels of a step: 16 rows x 4 columns.
  template <bool is_pair>
  static constexpr std::size_t kUnpackedBytes = kPanelRows * kChunkColumns;

  template <bool is_pair>
  static void Unpack(const uint8_t* codes, const Codebook (&codebooks)[4], uint8_t* unpacked) {
    for (std::size_t vector = 0; vector < 16 / kSteps<is_pair>; ++vector) {
#pragma GCC unroll 4
      for (std::size_t part = 0; part < 4; ++part) {
        int8x16_t levels[kSteps<is_pair>];
        Levels<is_pair>(codebooks[part], vld1q_u8(codes + 64 * vector + 16 * part), AllRows(),
                        levels);
#pragma GCC unroll 8
        for (std::size_t i = 0; i < kSteps<is_pair>; ++i) {
          uint8_t* to = unpacked + 64 * (kSteps<is_pair> * vector + i) + 16 * part;
          vst1q_u8(to, vreinterpretq_u8_s8(is_pair ? levels[i] : SignOf(levels[i])));
        }
      }
    }
  }
};

}  // namespace
}  // namespace bivlm

#endif  // BIVLM_CPU_NEON_LEVELS_NEON_H_
