// GroupMatMul with the dot products of ARMv8.2.
#if !defined(__ARM_FEATURE_DOTPROD)
#error "compile this file with the flags that CMakeLists.txt gives to the dotprod kernels"
#endif

#include "int8_rows.h"
#include "neon/group_lanes_neon.h"

namespace bivlm {
namespace {

struct DotProd : GroupLanesNeon {
  template <std::size_t bits>
  static Ints Dot(const Levels<bits>& levels, const int8_t* const (&q)[2], Ints start) {
    if constexpr (bits == 8) return vdotq_s32(Ints{}, levels.low, vld1q_s8(q[0]));
    return vdotq_s32(vdotq_s32(start, levels.low, vld1q_s8(q[0])), levels.high, vld1q_s8(q[1]));
  }
};

}  // namespace

const GroupMatMulFunctions GroupMatMulDotProd = {1U << 17, PrepareInt8Neon,
                                                 MultiplyGroups<DotProd>};

}  // namespace bivlm
