// GroupQueryAttention on any CPU, with vectors of four floats.
#include "attention_blocks.h"
#include "generic/vectors_generic.h"

namespace bivlm {
namespace {

struct Isa : Vectors {
  static constexpr std::size_t kTileRows = 6;
  static constexpr std::size_t kTileVectors = 2;
  static constexpr std::size_t kDotRows = 4;
};

}  // namespace

const AttentionFunctions AttentionGeneric = {Attention<Isa>::RotateKey, Attention<Isa>::WriteValue,
                                             Attention<Isa>::WorkFloats, Attention<Isa>::Attend};

}  // namespace bivlm
