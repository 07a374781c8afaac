// Vectors of four floats for the headers of src/cpu that take any, on the Advanced SIMD (NEON) of
// ARMv8.0.
#ifndef BIVLM_CPU_VECTORS_NEON_H_
#define BIVLM_CPU_VECTORS_NEON_H_

#if !defined(__ARM_NEON) || !defined(__aarch64__)
#error "compile this file for aarch64"
#endif

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "bivlm/float16.h"

namespace bivlm {
namespace {

struct Vectors {
  typedef float Vec __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef double Doubles __attribute__((vector_size(16)));
  static constexpr std::size_t kLanes = 4;

  static Bits Lanes() { return Bits{0, 1, 2, 3}; }

  template <std::size_t h>
  static Vec Swap(Vec v) {
    if constexpr (h == 1) return vrev64q_f32(v);
    return vextq_f32(v, v, 2);
  }

  static Vec Widen(const uint16_t* halves) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves)));
  }

  static void FromHalves(const uint16_t* halves, std::size_t count, float* floats) {
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) vst1q_f32(floats + i, Widen(halves + i));
    for (; i < count; ++i) floats[i] = FloatFromHalf(halves[i]);
  }

  static void ToHalves(const float* floats, std::size_t count, uint16_t* halves) {
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      vst1_u16(halves + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(floats + i))));
    }
    for (; i < count; ++i) halves[i] = HalfFromFloat(floats[i]);
  }

  // kLanes / 2 of them.
  static Doubles ToDoubles(const float* floats) { return vcvt_f64_f32(vld1_f32(floats)); }

  static Vec ToFloats(Ints v) { return vcvtq_f32_s32(v); }
  static Ints Round(Vec v) { return vcvtnq_s32_f32(v); }
  static Vec MultiplyAdd(Vec a, Vec b, Vec sum) { return vfmaq_f32(sum, a, b); }
  static Vec MultiplyAdd(Vec a, float b, Vec sum) { return vfmaq_n_f32(sum, a, b); }

  static uint32_t Largest(Bits v) { return vmaxvq_u32(v); }
  static int32_t Sum(Ints v) { return vaddvq_s32(v); }

  // The numbers of v, -128 to 127, as 4 kLanes bytes.
  static void SaveBytes(const Ints (&v)[4], int8_t* bytes) {
    const int16x8_t low = vcombine_s16(vmovn_s32(v[0]), vmovn_s32(v[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(v[2]), vmovn_s32(v[3]));
    vst1q_s8(bytes, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
  }

  // Lane i: floats[columns[i]]; columns at any address.
  static Vec Gather(const float* floats, const uint8_t* columns) {
    uint16_t at[kLanes];
    std::memcpy(at, columns, sizeof(at));
    return Vec{floats[at[0]], floats[at[1]], floats[at[2]], floats[at[3]]};
  }
};

}  // namespace
}  // namespace bivlm

#endif  // BIVLM_CPU_VECTORS_NEON_H_
