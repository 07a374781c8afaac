// Float arithmetic on vectors of any length.
//
// `Isa` gives the vectors. It must live in an anonymous namespace, so that what is instantiated
// with it stays in its object file. Members:
//   Vec, Bits          vectors of kLanes floats and uint32; arithmetic is that of GCC's vectors
//   FromHalves, ToHalves      n halves to floats and back
#ifndef BIVLM_CPU_VECTOR_MATH_H_
#define BIVLM_CPU_VECTOR_MATH_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace bivlm {

template <typename Isa>
struct VectorMath {
  using Vec = typename Isa::Vec;
  using Bits = typename Isa::Bits;

  static Vec Load(const float* address) {
    Vec v;
    std::memcpy(&v, address, sizeof(v));
    return v;
  }
  static void Store(float* address, Vec v) { std::memcpy(address, &v, sizeof(v)); }
  // Not 0 + value: the compiler must add, for the sake of -0.
  static Vec All(float value) { return value - Vec{}; }

  // e^x for x <= 0, 0 where that is below the smallest normal float. Relative error below 2e-7: a
  // polynomial on +-ln(2) / 2 (S. Moshier, Cephes, expf) times a power of 2.
  static Vec Exp(Vec x) {
    constexpr float kRound = 0x1.8p23F;  // the sum's last bit is 1
    const Vec shifted = x * 1.44269504F + kRound;
    const Vec n = shifted - kRound;
    const Vec r = (x - n * 0.693359375F) + n * 2.12194440e-4F;
    Vec p = r * 1.9875691500e-4F + 1.3981999507e-3F;
    p = p * r + 8.3334519073e-3F;
    p = p * r + 4.1665795894e-2F;
    p = p * r + 1.6666665459e-1F;
    p = p * r + 5.0000001201e-1F;
    p = p * (r * r) + r + 1.0F;
    Bits power;
    std::memcpy(&power, &shifted, sizeof(power));
    power = (power + 127U) << 23;
    Vec scale;
    std::memcpy(&scale, &power, sizeof(scale));
    return x < -87.3365F ? Vec{} : p * scale;
  }
};

}  // namespace bivlm

#endif  // BIVLM_CPU_VECTOR_MATH_H_
