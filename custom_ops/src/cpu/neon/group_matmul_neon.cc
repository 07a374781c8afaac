// GroupMatMul with the NEON of ARMv8.0: products in 16 bits. At 8 bits one is 128 * 127 at most; at
// 4 bits two are added there, 2 * 15 * 127.
#include "int8_rows.h"
#include "neon/group_lanes_neon.h"

namespace bivlm {
namespace {

struct Neon : GroupLanesNeon {
  // The products of a lane, from those of its pairs of bytes.
  static Ints FromPairs(int32x4_t low, int32x4_t high) { return vpaddq_s32(low, high); }

  template <std::size_t bits>
  static Ints Dot(const Levels<bits>& levels, const int8_t* const (&q)[2], Ints start) {
    const int8x16_t x = vld1q_s8(q[0]);
    int16x8_t low = vmull_s8(vget_low_s8(levels.low), vget_low_s8(x));
    int16x8_t high = vmull_high_s8(levels.low, x);
    if constexpr (bits == 8) return FromPairs(vpaddlq_s16(low), vpaddlq_s16(high));
    const int8x16_t y = vld1q_s8(q[1]);
    low = vmlal_s8(low, vget_low_s8(levels.high), vget_low_s8(y));
    high = vmlal_high_s8(high, levels.high, y);
    return start + FromPairs(vpaddlq_s16(low), vpaddlq_s16(high));
  }
};

}  // namespace

const GroupMatMulFunctions GroupMatMulNeon = {1U << 16, PrepareInt8Neon, MultiplyGroups<Neon>};

}  // namespace bivlm
