// GroupMatMul: Y[m, i] = sum_j What[i, j] X[m, j], What codes of 4 or 8 bits with a scale per block
// of columns.
//
// export/OPS.md says what the operator computes. Names here: m tokens, n output features (the rows
// of the weight), k input features. A product has two steps as that of BinaryMatMul has: tokens are
// prepared, then rows of the weight are multiplied. The weight is read where it lies.
#ifndef BIVLM_GROUP_MATMUL_H_
#define BIVLM_GROUP_MATMUL_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "bivlm/binary_matmul.h"
#include "bivlm/cpu_features.h"
#include "bivlm/float16.h"
#include "bivlm/parallel.h"

namespace bivlm {

// The tensors may start at any address.
struct GroupMatMulWeight {
  std::size_t k = 0;
  std::size_t n = 0;
  std::size_t bits = 8;   // 4 or 8
  std::size_t block = 0;  // columns per scale: 16, 32 or 64; divides k

  const uint8_t* codes = nullptr;   // (n, k * bits / 8); of 4 bits the low nibble is first
  const uint8_t* scales = nullptr;  // float16 (n, k / block)

  std::size_t blocks() const { return k / block; }
  std::size_t row_bytes() const { return k * bits / 8; }
};

// Sets the sizes from the attributes of the operator; leaves the tensors null. Returns "" or what
// is wrong with them.
std::string MakeGroupMatMulWeight(int64_t k, int64_t n, int64_t bits, int64_t block,
                                  GroupMatMulWeight* weight);

struct GroupMatMulArgs {
  const GroupMatMulWeight* weight = nullptr;
  ElementType type = ElementType::kFloat32;  // of x and y
  std::size_t m = 0;
  const void* x = nullptr;  // (m, k) row-major
  void* y = nullptr;        // (m, n) row-major, overwritten
};

// One instruction set's implementation.
struct GroupMatMulFunctions {
  // Products of a weight with an activation that take about 5 us: the size of a task.
  std::size_t task_products;
  // Rounds tokens to int8, as BinaryMatMul does it; null: `multiply` takes floats.
  void (*round)(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                std::byte* prepared, float* work);
  // Writes y for the tokens [token_begin, token_end), of the weight's rows [row_begin, row_end).
  // `prepared` starts at token_begin: float x[k] each, NaN in all of a token that is not finite, or
  // what group_tokens.h says.
  void (*multiply)(const GroupMatMulArgs& args, std::size_t token_begin, std::size_t token_end,
                   std::size_t row_begin, std::size_t row_end, const std::byte* prepared);
};

struct GroupMatMulKernel {
  const char* name;
  IsaSet isa;  // what it needs
  const GroupMatMulFunctions* functions;
};

#define BIVLM_GROUP_MATMUL_KERNEL(needs, symbol, label) extern const GroupMatMulFunctions symbol;
#include "bivlm/group_matmul_kernels.inc"
#undef BIVLM_GROUP_MATMUL_KERNEL

struct GroupMatMulKernelList {
  const GroupMatMulKernel* first;
  std::size_t count;
  const GroupMatMulKernel* begin() const { return first; }
  const GroupMatMulKernel* end() const { return first + count; }
};

// All kernels of this build, best first.
GroupMatMulKernelList GroupMatMulKernels();

// As SelectBinaryMatMul.
const GroupMatMulKernel* SelectGroupMatMul(IsaSet supported, std::string_view forced);
std::string AvailableGroupMatMulNames(IsaSet supported);

// Computes y. Throws std::bad_alloc if there is no memory for the prepared tokens.
void RunGroupMatMul(const GroupMatMulKernel& kernel, const GroupMatMulArgs& args,
                    const Executor& executor);

}  // namespace bivlm

#endif  // BIVLM_GROUP_MATMUL_H_
