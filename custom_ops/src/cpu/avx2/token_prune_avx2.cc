// The feature loops of TokenPrune with AVX2.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx2 kernels"
#endif

#include "avx2/vectors_avx2.h"
#include "token_prune_loops.h"

namespace bivlm {
namespace {

struct Isa : Vectors {
  static constexpr std::size_t kRowTile = 2;
  static constexpr std::size_t kQueryTile = 4;

  static Vec FromBytes(const int8_t* bytes) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
  }
};

using Loops = TokenPruneLoops<Isa>;

}  // namespace

const TokenPruneFunctions TokenPruneAvx2 = {Loops::SquaredNorms, Loops::Dots, Loops::Uncovered,
                                            Loops::Product};

}  // namespace bivlm
