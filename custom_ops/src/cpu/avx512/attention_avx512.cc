// GroupQueryAttention with AVX-512.
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx512 kernels"
#endif

#include "attention_blocks.h"
#include "avx512/vectors_avx512.h"

namespace bivlm {
namespace {

struct Isa : Vectors {
  static constexpr std::size_t kTileRows = 6;
  static constexpr std::size_t kTileVectors = 4;
  static constexpr std::size_t kDotRows = 4;
};

}  // namespace

const AttentionFunctions AttentionAvx512 = {Attention<Isa>::RotateKey, Attention<Isa>::WriteValue,
                                            Attention<Isa>::WorkFloats, Attention<Isa>::Attend};

}  // namespace bivlm
