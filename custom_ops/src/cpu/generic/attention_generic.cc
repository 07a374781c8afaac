// GroupQueryAttention on any CPU, with vectors of four floats.
#include "attention_blocks.h"

namespace bivlm {
namespace {

struct Isa {
  typedef float Vec __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  static constexpr std::size_t kLanes = 4;
  static constexpr std::size_t kTileRows = 6;
  static constexpr std::size_t kTileVectors = 2;
  static constexpr std::size_t kDotRows = 4;

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

const AttentionFunctions AttentionGeneric = {Attention<Isa>::WorkFloats, Attention<Isa>::Attend};

}  // namespace bivlm
