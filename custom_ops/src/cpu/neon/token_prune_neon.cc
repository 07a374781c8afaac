// The feature loops of TokenPrune with NEON.
#include "neon/vectors_neon.h"
#include "token_prune_loops.h"

namespace bivlm {
namespace {

struct Isa : Vectors {
  static constexpr std::size_t kRowTile = 4;
  static constexpr std::size_t kQueryTile = 4;

  static Vec FromBytes(const int8_t* bytes) {
    int32_t four;
    std::memcpy(&four, bytes, sizeof(four));
    const int8x8_t narrow = vreinterpret_s8_s32(vdup_n_s32(four));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(narrow))));
  }
};

using Loops = TokenPruneLoops<Isa>;

}  // namespace

const TokenPruneFunctions TokenPruneNeon = {Loops::SquaredNorms, Loops::Dots, Loops::Uncovered,
                                            Loops::Product};

}  // namespace bivlm
