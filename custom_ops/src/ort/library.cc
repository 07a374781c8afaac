// What the library for the CPU registers.
#include "operators.h"

namespace bivlm::ort {
namespace {

std::vector<Operator> Operators(const Api* api) {
  std::vector<Operator> operators = {
      MakeBinaryMatMulOp(api),
      MakeGroupMatMulOp(api),
      MakeAttentionOp(api, ElementType::kFloat32, ElementType::kFloat32),
      MakeAttentionOp(api, ElementType::kFloat16, ElementType::kFloat16),
      MakeAttentionOp(api, ElementType::kFloat32, ElementType::kFloat16),
      MakeGatedSiluOp(api, ElementType::kFloat32),
      MakeGatedSiluOp(api, ElementType::kFloat16)};
  AddTokenPruneOps(api, MakeTokenPruneOp, &operators);
  return operators;
}

}  // namespace

const Library kLibrary = {"bivlm_custom_ops", kApiVersion, Operators};

}  // namespace bivlm::ort
