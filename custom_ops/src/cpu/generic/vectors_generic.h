// Vectors of four floats for vector_math.h, on any CPU.
#ifndef BIVLM_CPU_VECTORS_GENERIC_H_
#define BIVLM_CPU_VECTORS_GENERIC_H_

#include <cstddef>
#include <cstdint>

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

  static void FromHalves(const uint16_t* halves, std::size_t count, float* floats) {
    for (std::size_t i = 0; i < count; ++i) floats[i] = FloatFromHalf(halves[i]);
  }

  static void ToHalves(const float* floats, std::size_t count, uint16_t* halves) {
    for (std::size_t i = 0; i < count; ++i) halves[i] = HalfFromFloat(floats[i]);
  }
};

}  // namespace
}  // namespace bivlm

#endif  // BIVLM_CPU_VECTORS_GENERIC_H_
