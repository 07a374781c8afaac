// What the kernels of GroupMatMul for ARM (neon and dotprod) share beside group_products.h.
#ifndef BIVLM_CPU_NEON_GROUP_LANES_NEON_H_
#define BIVLM_CPU_NEON_GROUP_LANES_NEON_H_

#include "group_products.h"
#include "neon/vectors_neon.h"

namespace bivlm {
namespace {

struct GroupLanesNeon : Vectors {
  static constexpr std::size_t kStreams = 4;
  template <std::size_t bits>
  struct Levels {
    int8x16_t low;   // at 8 bits the levels; at 4 bits the codes of even columns
    int8x16_t high;  // at 4 bits those of odd columns
  };

  template <std::size_t bits>
  static Levels<bits> Load(const uint8_t* codes) {
    const uint8x16_t bytes = vld1q_u8(codes);
    if constexpr (bits == 8) {
      const int8x16_t levels = vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(128)));
      return {levels, levels};
    }
    return {vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15))),
            vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4))};
  }

  static void Sum(Vec a, Vec b, Vec c, Vec d, float* sums) {
    vst1q_f32(sums, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
  }

  template <std::size_t lanes>
  static Vec Spread(const float* scales) {
    if constexpr (lanes >= kLanes) return vld1q_dup_f32(scales);
    const float32x2_t two = vld1_f32(scales);
    return vcombine_f32(vdup_lane_f32(two, 0), vdup_lane_f32(two, 1));
  }
};

}  // namespace
}  // namespace bivlm

#endif  // BIVLM_CPU_NEON_GROUP_LANES_NEON_H_
