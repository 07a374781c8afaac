// The transform of activations and their rounding to int8, with AVX2.
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx2 kernels"
#endif

#include "avx2/vectors_avx2.h"
#include "prepare_int8.h"

namespace bivlm {

void PrepareInt8Avx2(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                     std::byte* prepared, float* work) {
  PrepareInt8<Vectors>::Rows(args, row_begin, row_end, prepared, work);
}

}  // namespace bivlm
