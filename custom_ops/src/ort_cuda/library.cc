// What the library for CUDA registers. It is registered alone, ONNX Runtime takes one library per
// domain. GroupQueryAttention is not in it: the model-local function of that name runs by ONNX
// Runtime's own operator, which has kernels for CUDA.
#include "ort_cuda/operators.h"

namespace bivlm::ort {
namespace {

std::vector<Operator> Operators(const Api* api) {
  std::vector<Operator> operators = {MakeCudaBinaryMatMulOp(api),
                                     MakeCudaGatedSiluOp(api, ElementType::kFloat32),
                                     MakeCudaGatedSiluOp(api, ElementType::kFloat16)};
  AddTokenPruneOps(api, MakeCudaTokenPruneOp, &operators);
  return operators;
}

}  // namespace

const Library kLibrary = {"bivlm_custom_ops_cuda", kGpuApiVersion, Operators};

}  // namespace bivlm::ort
