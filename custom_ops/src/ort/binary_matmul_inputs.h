// What BinaryMatMul is on every device: attributes, checks of the inputs, and shapes.
#ifndef BIVLM_ORT_BINARY_MATMUL_INPUTS_H_
#define BIVLM_ORT_BINARY_MATMUL_INPUTS_H_

#include "adaptor.h"
#include "bivlm/binary_matmul.h"
#include "operators.h"

namespace bivlm::ort {

// The inputs that hold the weight; missing ones where there is nothing to check.
struct WeightTensors {
  Tensor codes;
  Tensor coefficients;
  Tensor signs;
  Tensor order;
};

// Where tensors lie that have been checked.
struct WeightPointers {
  const uint8_t* codes = nullptr;
  const uint8_t* coefficients = nullptr;
  const uint8_t* signs = nullptr;
  const uint8_t* order = nullptr;
};

// The attributes of a node, checked.
BinaryMatMulWeight ReadBinaryMatMulWeight(const Api* api, const KernelInfo* info);

WeightTensors ConstantWeightTensors(const Api* api, const KernelInfo* info);

// The tensors of a call that are not those of `checked`.
WeightTensors WeightTensorsOfCall(const Api* api, const KernelContext* context,
                                  const WeightPointers& checked);

// Checks types and shapes of the tensors that are there and enters their pointers; their contents
// are not looked at.
void SetWeightTensors(const WeightTensors& tensors, BinaryMatMulWeight* weight);

// Refuses `count` uint16 numbers, at any address, that are no permutation.
void CheckOrder(const uint8_t* bytes, std::size_t count);

// X of a call, checked, and its output. `weight` must outlive the arguments.
BinaryMatMulArgs ReadBinaryMatMulArgs(const Api* api, KernelContext* context,
                                      const BinaryMatMulWeight& weight);

// The operator without its kernel.
Operator BinaryMatMulSchema(const Api* api);

}  // namespace bivlm::ort

#endif  // BIVLM_ORT_BINARY_MATMUL_INPUTS_H_
