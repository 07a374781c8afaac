// BinaryMatMul with AVX-512 VNNI: int8 levels times int8 activations.
#include "binary_matmul_avx512.h"

namespace bivlm {
namespace {

// From this many rows on, it pays to unpack levels to memory (measured; with 16 rows of a cold
// weight of 4096 x 4096 two passes of decode took 10 % less).
constexpr std::size_t kPrefillRows = 17;

void Multiply(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
              std::size_t panel_begin, std::size_t panel_end, const std::byte* prepared) {
  const auto multiply = row_end - row_begin < kPrefillRows ? DecodeAvx512 : PrefillAvx512;
  multiply(args, row_begin, row_end, panel_begin, panel_end, prepared);
}

}  // namespace

const BinaryMatMulFunctions BinaryMatMulAvx512 = {1U << 19, Int8RowBytes, PrepareInt8Avx512,
                                                  Multiply};

}  // namespace bivlm
