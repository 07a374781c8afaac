// GatedSiLU of some rows, for any instruction set; `Isa` as in vector_math.h.
#ifndef BIVLM_CPU_GATED_SILU_ROWS_H_
#define BIVLM_CPU_GATED_SILU_ROWS_H_

#include <algorithm>
#include <cstring>

#include "bivlm/gated_silu.h"
#include "vector_math.h"

namespace bivlm {

template <typename Isa>
struct GatedSilu : VectorMath<Isa> {
  using Math = VectorMath<Isa>;
  using Vec = typename Isa::Vec;
  static constexpr std::size_t kPart = 128;  // halves that are widened at a time
  using Math::Exp;
  using Math::Load;
  using Math::Store;

  // Without overflow: with t = e^-|gate|, the logistic function is 1 / (1 + t) or t / (1 + t).
  static Vec Gated(Vec gate, Vec up) {
    const Vec t = Exp(gate < 0.0F ? gate : -gate);
    return gate * (gate < 0.0F ? t : Vec{} + 1.0F) / (1.0F + t) * up;
  }

  static void Part(const float* gate, const float* up, std::size_t count, float* y) {
    std::size_t i = 0;
    for (; i + Isa::kLanes <= count; i += Isa::kLanes) {
      Store(y + i, Gated(Load(gate + i), Load(up + i)));
    }
    if (i == count) return;
    float rest[3][Isa::kLanes] = {};
    std::memcpy(rest[0], gate + i, (count - i) * sizeof(float));
    std::memcpy(rest[1], up + i, (count - i) * sizeof(float));
    Store(rest[2], Gated(Load(rest[0]), Load(rest[1])));
    std::memcpy(y + i, rest[2], (count - i) * sizeof(float));
  }

  static void Rows(const GatedSiluArgs& args, std::size_t begin, std::size_t end) {
    for (std::size_t row = begin; row < end; ++row) {
      const std::size_t gate_at = 2 * row * args.width;
      if (args.type == ElementType::kFloat32) {
        const float* gate = static_cast<const float*>(args.x) + gate_at;
        Part(gate, gate + args.width, args.width, static_cast<float*>(args.y) + row * args.width);
        continue;
      }
      for (std::size_t at = 0; at < args.width; at += kPart) {
        const std::size_t count = std::min(kPart, args.width - at);
        const uint16_t* gate = static_cast<const uint16_t*>(args.x) + gate_at + at;
        float floats[2][kPart];
        Isa::FromHalves(gate, count, floats[0]);
        Isa::FromHalves(gate + args.width, count, floats[1]);
        Part(floats[0], floats[1], count, floats[0]);
        Isa::ToHalves(floats[0], count, static_cast<uint16_t*>(args.y) + row * args.width + at);
      }
    }
  }
};

}  // namespace bivlm

#endif  // BIVLM_CPU_GATED_SILU_ROWS_H_
