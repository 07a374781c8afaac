// The slots of bivlm/ort_abi.h against the official headers of ONNX Runtime, at compile time.
#include "bivlm/ort_abi.h"

#include <cstdio>

#ifdef BIVLM_HAS_ONNXRUNTIME_HEADERS

#include <onnxruntime_c_api.h>

namespace {

namespace ours = bivlm::ort;

static_assert(ORT_API_VERSION >= 18);

#define BIVLM_CHECK_SLOT(name, slot, ...)                                     \
  static_assert(offsetof(OrtApi, name) == ours::name::kSlot * sizeof(void*)); \
  static_assert(ours::name::kSlot < sizeof(ours::Api) / sizeof(void*));
BIVLM_ORT_API_FUNCTIONS(BIVLM_CHECK_SLOT)
BIVLM_ORT_GPU_FUNCTIONS(BIVLM_CHECK_SLOT)
BIVLM_ORT_SESSION_FUNCTIONS(BIVLM_CHECK_SLOT)
#undef BIVLM_CHECK_SLOT
static_assert(sizeof(ours::Api) <= sizeof(OrtApi));
static_assert(offsetof(OrtApiBase, GetApi) == offsetof(ours::ApiBase, get_api));
static_assert(offsetof(OrtApiBase, GetVersionString) ==
              offsetof(ours::ApiBase, get_version_string));

static_assert(offsetof(OrtAllocator, Alloc) == offsetof(ours::Allocator, Alloc));
static_assert(offsetof(OrtAllocator, Free) == offsetof(ours::Allocator, Free));

#define BIVLM_CHECK_MEMBER(name) \
  static_assert(offsetof(OrtCustomOp, name) == offsetof(ours::CustomOp, name));
BIVLM_CHECK_MEMBER(version)
BIVLM_CHECK_MEMBER(CreateKernel)
BIVLM_CHECK_MEMBER(GetName)
BIVLM_CHECK_MEMBER(GetExecutionProviderType)
BIVLM_CHECK_MEMBER(GetInputType)
BIVLM_CHECK_MEMBER(GetInputTypeCount)
BIVLM_CHECK_MEMBER(GetOutputType)
BIVLM_CHECK_MEMBER(GetOutputTypeCount)
BIVLM_CHECK_MEMBER(KernelCompute)
BIVLM_CHECK_MEMBER(KernelDestroy)
BIVLM_CHECK_MEMBER(GetInputCharacteristic)
BIVLM_CHECK_MEMBER(GetOutputCharacteristic)
BIVLM_CHECK_MEMBER(GetInputMemoryType)
BIVLM_CHECK_MEMBER(GetVariadicInputMinArity)
BIVLM_CHECK_MEMBER(GetVariadicInputHomogeneity)
BIVLM_CHECK_MEMBER(GetVariadicOutputMinArity)
BIVLM_CHECK_MEMBER(GetVariadicOutputHomogeneity)
BIVLM_CHECK_MEMBER(CreateKernelV2)
BIVLM_CHECK_MEMBER(KernelComputeV2)
BIVLM_CHECK_MEMBER(InferOutputShapeFn)
BIVLM_CHECK_MEMBER(GetStartVersion)
BIVLM_CHECK_MEMBER(GetEndVersion)
#undef BIVLM_CHECK_MEMBER

#define BIVLM_CHECK_VALUE(ours_value, official) \
  static_assert(static_cast<int>(ours_value) == static_cast<int>(official));
BIVLM_CHECK_VALUE(ours::ErrorCode::kFail, ORT_FAIL)
BIVLM_CHECK_VALUE(ours::ErrorCode::kInvalidArgument, ORT_INVALID_ARGUMENT)
BIVLM_CHECK_VALUE(ours::ErrorCode::kRuntimeException, ORT_RUNTIME_EXCEPTION)
BIVLM_CHECK_VALUE(ours::ErrorCode::kNotImplemented, ORT_NOT_IMPLEMENTED)
BIVLM_CHECK_VALUE(ours::ElementType::kUndefined, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED)
BIVLM_CHECK_VALUE(ours::ElementType::kFloat32, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
BIVLM_CHECK_VALUE(ours::ElementType::kInt8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8)
BIVLM_CHECK_VALUE(ours::ElementType::kUint8, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8)
BIVLM_CHECK_VALUE(ours::ElementType::kUint16, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16)
BIVLM_CHECK_VALUE(ours::ElementType::kInt32, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32)
BIVLM_CHECK_VALUE(ours::ElementType::kInt64, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64)
BIVLM_CHECK_VALUE(ours::ElementType::kFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16)
BIVLM_CHECK_VALUE(ours::Characteristic::kRequired, INPUT_OUTPUT_REQUIRED)
BIVLM_CHECK_VALUE(ours::Characteristic::kOptional, INPUT_OUTPUT_OPTIONAL)
BIVLM_CHECK_VALUE(ours::MemoryType::kDefault, OrtMemTypeDefault)
BIVLM_CHECK_VALUE(ours::MemoryType::kCpuInput, OrtMemTypeCPUInput)
BIVLM_CHECK_VALUE(ours::AttributeType::kInt, ORT_OP_ATTR_INT)
BIVLM_CHECK_VALUE(ours::AllocatorType::kDevice, OrtDeviceAllocator)
BIVLM_CHECK_VALUE(ours::LoggingLevel::kFatal, ORT_LOGGING_LEVEL_FATAL)
#undef BIVLM_CHECK_VALUE

}  // namespace

int main() {
  std::printf("ort_abi_test: equal to the headers of API version %d\n", ORT_API_VERSION);
  return 0;
}

#else

int main() {
  std::printf(
      "skipped: onnxruntime_c_api.h not found; configure with -DONNXRUNTIME_INCLUDE_DIR=\n");
  return 77;
}

#endif
