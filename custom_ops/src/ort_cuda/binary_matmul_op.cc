// BinaryMatMul as an operator on a GPU.
#include <memory>

#include "bivlm/cuda/binary_matmul.h"
#include "ort/binary_matmul_inputs.h"
#include "ort_cuda/gpu_call.h"
#include "ort_cuda/operators.h"
#include "ort_cuda/provider.h"

namespace bivlm::ort {
namespace {

struct Kernel {
  const Api* api = nullptr;
  std::string label;
  BinaryMatMulWeight weight;  // with the pointers of the constant inputs, which are checked
  bool order_is_checked = false;
};

// Checks a constant `order`, which ONNX Runtime has put on the GPU. Waits for the copy, at the
// creation of the session.
void CheckOrderOnGpu(const Tensor& order) {
  std::vector<uint8_t> bytes(static_cast<std::size_t>(order.dims[0]) * sizeof(uint16_t));
  cudaError_t error =
      cudaMemcpyAsync(bytes.data(), order.data, bytes.size(), cudaMemcpyDefault, nullptr);
  if (error == cudaSuccess) error = cudaStreamSynchronize(nullptr);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("order could not be read: ") + cudaGetErrorString(error));
  }
  CheckOrder(bytes.data(), static_cast<std::size_t>(order.dims[0]));
}

Status* CreateKernel(const CustomOp*, const Api* api, const KernelInfo* info, void** out) noexcept {
  std::string label = "BinaryMatMul";
  return Guard(api, label, [&] {
    auto kernel = std::make_unique<Kernel>();
    kernel->api = api;
    kernel->label = NodeLabel(api, info, "BinaryMatMul");
    label = kernel->label;
    RequireOurKernels();
    kernel->weight = ReadBinaryMatMulWeight(api, info);
    const WeightTensors tensors = ConstantWeightTensors(api, info);
    SetWeightTensors(tensors, &kernel->weight);
    if (tensors.order) CheckOrderOnGpu(tensors.order);
    kernel->order_is_checked = static_cast<bool>(tensors.order);
    *out = kernel.release();
  });
}

Status* Compute(void* state, KernelContext* context) noexcept {
  const Kernel& kernel = *static_cast<const Kernel*>(state);
  return Guard(kernel.api, kernel.label, [&] {
    BinaryMatMulWeight weight = kernel.weight;
    const WeightPointers checked = {weight.codes, weight.coefficients, weight.signs, weight.order};
    const WeightTensors tensors = WeightTensorsOfCall(kernel.api, context, checked);
    SetWeightTensors(tensors, &weight);
    if (tensors.order && !kernel.order_is_checked) {
      throw InvalidArgument(
          "order is not a constant; on CUDA it must be one, since a run does not read it back");
    }
    const BinaryMatMulArgs args = ReadBinaryMatMulArgs(kernel.api, context, weight);
    const std::size_t bytes = cuda::BinaryMatMulScratchBytes(weight, args.m);
    const GpuScratch scratch(kernel.api, context, bytes);
    RequireLaunch(kernel.label, cuda::LaunchBinaryMatMul(args, scratch.data(), bytes,
                                                         StreamOf(kernel.api, context)));
  });
}

}  // namespace

Operator MakeCudaBinaryMatMulOp(const Api* api) {
  Operator op = BinaryMatMulSchema(api);
  op.GetExecutionProviderType = [](const CustomOp*) { return kProvider; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.CreateKernelV2 = CreateKernel;
  op.KernelComputeV2 = Compute;
  return op;
}

}  // namespace bivlm::ort
