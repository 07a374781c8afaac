// GroupQueryAttention with NEON.
#include "attention_blocks.h"
#include "neon/vectors_neon.h"

namespace bivlm {
namespace {

struct Isa : Vectors {
  static constexpr std::size_t kTileRows = 6;
  static constexpr std::size_t kTileVectors = 4;  // 24 sums, of 32 registers
  static constexpr std::size_t kDotRows = 4;
};

}  // namespace

const AttentionFunctions AttentionNeon = {Attention<Isa>::RotateKey, Attention<Isa>::WriteValue,
                                          Attention<Isa>::WorkFloats, Attention<Isa>::Attend};

}  // namespace bivlm
