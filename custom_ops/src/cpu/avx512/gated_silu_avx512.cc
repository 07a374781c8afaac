// GatedSiLU with AVX-512.
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx512 kernels"
#endif

#include "avx512/vectors_avx512.h"
#include "gated_silu_rows.h"

namespace bivlm {

const GatedSiluFunctions GatedSiluAvx512 = {GatedSilu<Vectors>::Rows};

}  // namespace bivlm
