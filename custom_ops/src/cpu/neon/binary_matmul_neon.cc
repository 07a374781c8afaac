// BinaryMatMul with the NEON of ARMv8.0: int8 levels times int8 activations in 16 bits.
//
// A 16-bit lane takes the products of two steps, 2 * 127 * 127 at most, before pairs of lanes are
// added to 32 bits; of single blocks, whose levels are bits, it takes those of a whole chunk.
#include "neon/levels_neon.h"

namespace bivlm {
namespace {

// The sums of rows 0 and 1 of a part in `low`, 2 and 3 in `high`: two lanes each.
struct RowSums {
  int32x4_t low = vdupq_n_s32(0);
  int32x4_t high = vdupq_n_s32(0);

  // a and b: levels of two steps; x, y: four channels of each in every lane.
  void Add(int8x16_t a, int8x16_t b, int8x16_t x, int8x16_t y) {
    const int16x8_t first = vmull_s8(vget_low_s8(a), vget_low_s8(x));
    low = vpadalq_s16(low, vmlal_s8(first, vget_low_s8(b), vget_low_s8(y)));
    high = vpadalq_s16(high, vmlal_high_s8(vmull_high_s8(a, x), b, y));
  }
  int32x4_t Dots() const { return vpaddq_s32(low, high); }
};

// Four neighbouring channels in every lane.
int8x16_t BroadcastFour(const int8_t* q) {
  int32_t four;
  std::memcpy(&four, q, sizeof(four));
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

struct Neon : LevelsNeon {
  static constexpr std::size_t kDecodeTokens = 1;  // two take fewer instructions unpacked
  static constexpr std::size_t kTileTokens = 4;    // 16 accumulators

  template <bool is_pair, std::size_t tokens>
  static void Dot(const uint8_t* codes, const Codebook& codebook, const int8_t* const (&q)[tokens],
                  const int32_t (&q_sums)[tokens], Ints (&dots)[tokens]) {
    static_assert(tokens == 1);
    Begin(codes);
    if constexpr (is_pair) {
      RowSums sums;
#pragma GCC unroll 4
      for (std::size_t vector = 0; vector < 4; ++vector) {
        int8x16_t levels[4];
        Levels<true>(codebook, vld1q_u8(codes + 64 * vector), AllRows(), levels);
        const int8_t* x = q[0] + 16 * vector;
        sums.Add(levels[0], levels[1], BroadcastFour(x), BroadcastFour(x + 4));
        sums.Add(levels[2], levels[3], BroadcastFour(x + 8), BroadcastFour(x + 12));
      }
      dots[0] = sums.Dots();
    } else {
      int16x8_t low = vdupq_n_s16(0);
      int16x8_t high = vdupq_n_s16(0);
#pragma GCC unroll 2
      for (std::size_t vector = 0; vector < 2; ++vector) {
        int8x16_t levels[8];
        Levels<false>(codebook, vld1q_u8(codes + 64 * vector), AllRows(), levels);
#pragma GCC unroll 8
        for (std::size_t i = 0; i < 8; ++i) {
          const int8x16_t x = BroadcastFour(q[0] + 32 * vector + 4 * i);
          low = vmlal_s8(low, vget_low_s8(levels[i]), vget_low_s8(x));
          high = vmlal_high_s8(high, levels[i], x);
        }
      }
      dots[0] = Signed(vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)), q_sums[0]);
    }
    End(dots[0]);
  }

  template <bool is_pair, std::size_t tokens>
  static void DotUnpacked(const uint8_t* unpacked, const Codebook (&)[4], const Tile<tokens>& tile,
                          std::size_t chunk) {
    const int8_t* levels = reinterpret_cast<const int8_t*>(unpacked);
    for (std::size_t part = 0; part < 4; part += 2) {
      RowSums sums[tokens][2];
      for (std::size_t step = 0; step < 16; step += 2) {
        const int8_t* row = levels + 64 * step + 16 * part;
        const int8x16_t a0 = vld1q_s8(row);
        const int8x16_t a1 = vld1q_s8(row + 16);
        const int8x16_t b0 = vld1q_s8(row + 64);
        const int8x16_t b1 = vld1q_s8(row + 80);
#pragma GCC unroll 4
        for (std::size_t t = 0; t < tokens; ++t) {
          const int8_t* q = tile.rows[t].q + chunk * kChunkColumns + 4 * step;
          const int8x16_t x = BroadcastFour(q);
          const int8x16_t y = BroadcastFour(q + 4);
          sums[t][0].Add(a0, b0, x, y);
          sums[t][1].Add(a1, b1, x, y);
        }
      }
#pragma GCC unroll 4
      for (std::size_t t = 0; t < tokens; ++t) {
        const float scale = tile.rows[t].scale[chunk];
        float* partial = tile.partial + t * kPanelRows + part * kLanes;
        AddDots<Vectors>(sums[t][0].Dots(), scale, partial);
        AddDots<Vectors>(sums[t][1].Dots(), scale, partial + kLanes);
      }
    }
  }
};

}  // namespace

const BinaryMatMulFunctions BinaryMatMulNeon = {1U << 16, Int8RowBytes, PrepareInt8Neon,
                                                MultiplyInt8<Neon>};

}  // namespace bivlm
