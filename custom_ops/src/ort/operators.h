// The operators as ONNX Runtime sees them.
#ifndef BIVLM_ORT_OPERATORS_H_
#define BIVLM_ORT_OPERATORS_H_

#include <cstddef>
#include <vector>

#include "bivlm/ort_abi.h"

namespace bivlm::ort {

// An operator together with the API it was registered with: shape inference gets no other way to
// it.
struct Operator : CustomOp {
  const Api* api = nullptr;
  ElementType type = ElementType::kUndefined;         // of the activations; undefined: any
  ElementType cache_type = ElementType::kUndefined;   // of a KV cache, where there is one
  ElementType metric_type = ElementType::kUndefined;  // of features to compare, where there are any
};

// What the operators have alike; inputs and outputs are required unless set otherwise.
inline Operator NewOperator(const Api* api) {
  Operator op;
  op.api = api;
  op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
  op.GetInputCharacteristic = [](const CustomOp*, std::size_t) {
    return Characteristic::kRequired;
  };
  op.GetOutputCharacteristic = [](const CustomOp*, std::size_t) {
    return Characteristic::kRequired;
  };
  op.GetInputMemoryType = [](const CustomOp*, std::size_t) { return MemoryType::kDefault; };
  op.GetStartVersion = [](const CustomOp*) { return 1; };
  op.GetEndVersion = [](const CustomOp*) { return 1; };
  return op;
}

Operator MakeBinaryMatMulOp(const Api* api);
Operator MakeGroupMatMulOp(const Api* api);

// ONNX Runtime allows one input of any type per operator, these have more: one operator per type.
Operator MakeAttentionOp(const Api* api, ElementType type, ElementType cache_type);
Operator MakeGatedSiluOp(const Api* api, ElementType type);
Operator MakeTokenPruneOp(const Api* api, ElementType type, ElementType metric_type);

// What a library registers; each has its own list, and the oldest API that it can do with.
struct Library {
  const char* name;
  uint32_t api_version;
  std::vector<Operator> (*operators)(const Api* api);
};
extern const Library kLibrary;

// make(api, type of hidden, type of metric) for all types that TokenPrune has, behind `operators`.
template <typename Make>
void AddTokenPruneOps(const Api* api, const Make& make, std::vector<Operator>* operators) {
  for (const ElementType type : {ElementType::kFloat32, ElementType::kFloat16}) {
    for (const ElementType metric :
         {ElementType::kFloat32, ElementType::kFloat16, ElementType::kInt8}) {
      operators->push_back(make(api, type, metric));
    }
  }
}

}  // namespace bivlm::ort

#endif  // BIVLM_ORT_OPERATORS_H_
