// GroupQueryAttention with AVX2, FMA and F16C.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx2 kernels"
#endif

#include "attention_blocks.h"
#include "avx2/vectors_avx2.h"

namespace bivlm {
namespace {

struct Isa : Vectors {
  static constexpr std::size_t kTileRows = 6;
  static constexpr std::size_t kTileVectors = 2;
  static constexpr std::size_t kDotRows = 3;
};

}  // namespace

const AttentionFunctions AttentionAvx2 = {Attention<Isa>::RotateKey, Attention<Isa>::WriteValue,
                                          Attention<Isa>::WorkFloats, Attention<Isa>::Attend};

}  // namespace bivlm
