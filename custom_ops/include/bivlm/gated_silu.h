// GatedSiLU: silu(gate) * up of the two halves of each row. export/OPS.md says what the operator
// computes.
#ifndef BIVLM_GATED_SILU_H_
#define BIVLM_GATED_SILU_H_

#include <cstddef>
#include <string>
#include <string_view>

#include "bivlm/cpu_features.h"
#include "bivlm/float16.h"
#include "bivlm/parallel.h"

namespace bivlm {

struct GatedSiluArgs {
  ElementType type = ElementType::kFloat32;  // of both tensors
  std::size_t rows = 0;
  std::size_t width = 0;    // features of the output
  const void* x = nullptr;  // (rows, 2 * width): gate, up
  void* y = nullptr;        // (rows, width), overwritten
};

// One instruction set's implementation.
struct GatedSiluFunctions {
  // Writes the rows [begin, end).
  void (*rows)(const GatedSiluArgs& args, std::size_t begin, std::size_t end);
};

struct GatedSiluKernel {
  const char* name;
  IsaSet isa;  // what it needs
  const GatedSiluFunctions* functions;
};

#define BIVLM_GATED_SILU_KERNEL(needs, symbol, label) extern const GatedSiluFunctions symbol;
#include "bivlm/gated_silu_kernels.inc"
#undef BIVLM_GATED_SILU_KERNEL

struct GatedSiluKernelList {
  const GatedSiluKernel* first;
  std::size_t count;
  const GatedSiluKernel* begin() const { return first; }
  const GatedSiluKernel* end() const { return first + count; }
};

// All kernels of this build, best first.
GatedSiluKernelList GatedSiluKernels();

// As SelectBinaryMatMul.
const GatedSiluKernel* SelectGatedSilu(IsaSet supported, std::string_view forced);
std::string AvailableGatedSiluNames(IsaSet supported);

void RunGatedSilu(const GatedSiluKernel& kernel, const GatedSiluArgs& args,
                  const Executor& executor);

}  // namespace bivlm

#endif  // BIVLM_GATED_SILU_H_
