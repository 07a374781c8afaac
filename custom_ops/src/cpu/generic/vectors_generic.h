// Vectors of four floats for vector_math.h, on any CPU.
#ifndef BIVLM_CPU_VECTORS_GENERIC_H_
#define BIVLM_CPU_VECTORS_GENERIC_H_

#ifdef __aarch64__
#include <arm_neon.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "bivlm/float16.h"

namespace bivlm {
namespace {

struct Vectors {
  typedef float Vec __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  static constexpr std::size_t kLanes = 4;

  static Bits Lanes() { return Bits{0, 1, 2, 3}; }

  template <std::size_t h>
  static Vec Swap(Vec v) {
    return Vec{v[0 ^ h], v[1 ^ h], v[2 ^ h], v[3 ^ h]};
  }

  // FloatFromHalf of kLanes halves; exact for subnormal ones too, where floats are.
  static Vec Widen(const uint16_t* halves) {
#ifdef __aarch64__
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves)));
#else
    typedef int32_t Ints __attribute__((vector_size(16)));
    const Ints bits = {halves[0], halves[1], halves[2], halves[3]};
    const Ints magnitude = bits & 0x7fff;
    const Vec finite = (Vec)(magnitude << 13) * 0x1p112F;  // exponent bias 15 -> 127
    const Ints special = (magnitude >= 0x7c00) & 0x7f800000;
    return (Vec)((Bits)finite | (Bits)special | (Bits)(bits & 0x8000) << 16);
#endif
  }

  static void FromHalves(const uint16_t* halves, std::size_t count, float* floats) {
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const Vec wide = Widen(halves + i);
      std::memcpy(floats + i, &wide, sizeof(wide));
    }
    for (; i < count; ++i) floats[i] = FloatFromHalf(halves[i]);
  }

  static void ToHalves(const float* floats, std::size_t count, uint16_t* halves) {
    for (std::size_t i = 0; i < count; ++i) halves[i] = HalfFromFloat(floats[i]);
  }
};

}  // namespace
}  // namespace bivlm

#endif  // BIVLM_CPU_VECTORS_GENERIC_H_
