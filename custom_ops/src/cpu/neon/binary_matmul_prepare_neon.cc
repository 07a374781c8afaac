// The transform of activations and their rounding to int8, with NEON.
#include "neon/vectors_neon.h"
#include "prepare_int8.h"

namespace bivlm {

void PrepareInt8Neon(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                     std::byte* prepared, float* work) {
  PrepareInt8<Vectors>::Rows(args, row_begin, row_end, prepared, work);
}

}  // namespace bivlm
