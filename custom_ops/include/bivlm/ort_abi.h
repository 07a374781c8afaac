// The part of the ONNX Runtime C API that the custom operators and bivlm-device use, restated at
// API version 17 (what GPUs need: 18), so that both build without ONNX Runtime's headers and never
// link to it.
//
// OrtApi is a table of function pointers to which versions only append, so a slot number is valid
// for ever. tests/ort_abi_test.cc compares every number below with the official headers.
#ifndef BIVLM_ORT_ABI_H_
#define BIVLM_ORT_ABI_H_

#include <cstddef>
#include <cstdint>

namespace bivlm::ort {

inline constexpr uint32_t kApiVersion = 17;     // ONNX Runtime 1.17
inline constexpr uint32_t kGpuApiVersion = 18;  // of the operators on a GPU

struct CudaProviderOptions;
struct CustomOpDomain;
struct Env;
struct IoBinding;
struct KernelContext;
struct KernelInfo;
struct MemoryInfo;
struct OpAttr;
struct RunOptions;
struct Session;
struct SessionOptions;
struct ShapeInferContext;
struct Status;
struct TensorTypeAndShapeInfo;
struct TypeInfo;
struct Value;

enum class ErrorCode : int {
  kFail = 1,
  kInvalidArgument = 2,
  kRuntimeException = 6,
  kNotImplemented = 9
};

enum class ElementType : int {
  kUndefined = 0,
  kFloat32 = 1,
  kUint8 = 2,
  kInt8 = 3,
  kUint16 = 4,
  kInt32 = 6,
  kInt64 = 7,
  kFloat16 = 10,
};

enum class Characteristic : int { kRequired = 0, kOptional = 1 };
enum class MemoryType : int { kCpuInput = -2, kDefault = 0 };
enum class AttributeType : int { kInt = 1 };
enum class AllocatorType : int { kDevice = 0 };
enum class LoggingLevel : int { kFatal = 4 };

// OrtApi. The table of a newer ONNX Runtime is longer.
struct Api {
  void (*slots[278])();
};

// OrtAllocator. Newer ones have further members.
struct Allocator {
  uint32_t version;
  void* (*Alloc)(Allocator*, std::size_t bytes);
  void (*Free)(Allocator*, void*);
};

struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*get_version_string)();
};

// One function of the table.
template <std::size_t slot, typename Signature>
struct ApiFunction;

template <std::size_t slot, typename Result, typename... Arguments>
struct ApiFunction<slot, Result(Arguments...)> {
  static constexpr std::size_t kSlot = slot;
  static Result Call(const Api* api, Arguments... arguments) {
    return reinterpret_cast<Result (*)(Arguments...)>(api->slots[slot])(arguments...);
  }
};

// What the operators call: name, slot, signature.
#define BIVLM_ORT_API_FUNCTIONS(F)                                                                \
  F(CreateStatus, 0, Status*(ErrorCode, const char* message))                                     \
  F(GetErrorMessage, 2, const char*(const Status*))                                               \
  F(CreateCustomOpDomain, 26, Status*(const char* name, CustomOpDomain**))                        \
  F(CustomOpDomain_Add, 27, Status*(CustomOpDomain*, const struct CustomOp*))                     \
  F(AddCustomOpDomain, 28, Status*(SessionOptions*, CustomOpDomain*))                             \
  F(GetTensorMutableData, 51, Status*(Value*, void** data))                                       \
  F(CreateTensorTypeAndShapeInfo, 57, Status*(TensorTypeAndShapeInfo**))                          \
  F(SetTensorElementType, 58, Status*(TensorTypeAndShapeInfo*, ElementType))                      \
  F(SetDimensions, 59, Status*(TensorTypeAndShapeInfo*, const int64_t* dims, std::size_t rank))   \
  F(GetTensorElementType, 60, Status*(const TensorTypeAndShapeInfo*, ElementType*))               \
  F(GetDimensionsCount, 61, Status*(const TensorTypeAndShapeInfo*, std::size_t* rank))            \
  F(GetDimensions, 62, Status*(const TensorTypeAndShapeInfo*, int64_t* dims, std::size_t rank))   \
  F(GetSymbolicDimensions, 63,                                                                    \
    Status*(const TensorTypeAndShapeInfo*, const char** names, std::size_t rank))                 \
  F(GetTensorTypeAndShape, 65, Status*(const Value*, TensorTypeAndShapeInfo**))                   \
  F(KernelInfoGetAttribute_float, 85, Status*(const KernelInfo*, const char* name, float*))       \
  F(KernelInfoGetAttribute_int64, 86, Status*(const KernelInfo*, const char* name, int64_t*))     \
  F(KernelInfoGetAttribute_string, 87,                                                            \
    Status*(const KernelInfo*, const char* name, char* text, std::size_t* size))                  \
  F(KernelContext_GetInputCount, 88, Status*(const KernelContext*, std::size_t*))                 \
  F(KernelContext_GetOutputCount, 89, Status*(const KernelContext*, std::size_t*))                \
  F(KernelContext_GetInput, 90, Status*(const KernelContext*, std::size_t index, const Value**))  \
  F(KernelContext_GetOutput, 91,                                                                  \
    Status*(KernelContext*, std::size_t index, const int64_t* dims, std::size_t rank, Value**))   \
  F(ReleaseStatus, 93, void(Status*))                                                             \
  F(ReleaseTensorTypeAndShapeInfo, 99, void(TensorTypeAndShapeInfo*))                             \
  F(KernelInfoGetAttributeArray_int64, 163,                                                       \
    Status*(const KernelInfo*, const char* name, int64_t* values, std::size_t* count))            \
  F(KernelInfo_GetInputCount, 230, Status*(const KernelInfo*, std::size_t*))                      \
  F(KernelInfo_GetInputName, 232,                                                                 \
    Status*(const KernelInfo*, std::size_t index, char* name, std::size_t* size))                 \
  F(KernelInfo_GetNodeName, 244, Status*(const KernelInfo*, char* name, std::size_t* size))       \
  F(KernelInfoGetConstantInput_tensor, 249,                                                       \
    Status*(const KernelInfo*, std::size_t index, int* is_constant, const Value**))               \
  F(ShapeInferContext_GetInputCount, 267, Status*(const ShapeInferContext*, std::size_t*))        \
  F(ShapeInferContext_GetInputTypeShape, 268,                                                     \
    Status*(const ShapeInferContext*, std::size_t index, TensorTypeAndShapeInfo**))               \
  F(ShapeInferContext_GetAttribute, 269,                                                          \
    Status*(const ShapeInferContext*, const char* name, const OpAttr**))                          \
  F(ShapeInferContext_SetOutputTypeShape, 270,                                                    \
    Status*(const ShapeInferContext*, std::size_t index, const TensorTypeAndShapeInfo*))          \
  F(SetSymbolicDimensions, 271,                                                                   \
    Status*(TensorTypeAndShapeInfo*, const char* names[], std::size_t rank))                      \
  F(ReadOpAttr, 272,                                                                              \
    Status*(const OpAttr*, AttributeType, void* data, std::size_t bytes, std::size_t* used))      \
  F(KernelContext_ParallelFor, 274,                                                               \
    Status*(const KernelContext*, void (*body)(void* user, std::size_t index), std::size_t total, \
            std::size_t batches, void* user))

// What operators on a GPU call beside that: name, slot, signature.
#define BIVLM_ORT_GPU_FUNCTIONS(F)                                                        \
  F(ReleaseAllocator, 132, void(Allocator*))                                              \
  F(GetTensorMemoryInfo, 194, Status*(const Value*, const MemoryInfo**))                  \
  F(KernelContext_GetGPUComputeStream, 193, Status*(const KernelContext*, void** stream)) \
  F(KernelContext_GetAllocator, 253,                                                      \
    Status*(const KernelContext*, const MemoryInfo*, Allocator**))                        \
  F(KernelContext_GetScratchBuffer, 277,                                                  \
    Status*(const KernelContext*, const MemoryInfo*, std::size_t bytes, void** buffer))

// What a program calls that opens a model and runs it: name, slot, signature.
#define BIVLM_ORT_SESSION_FUNCTIONS(F)                                                             \
  F(CreateEnv, 3, Status*(LoggingLevel, const char* name, Env**))                                  \
  F(CreateSession, 7, Status*(const Env*, const char* path, const SessionOptions*, Session**))     \
  F(CreateSessionOptions, 10, Status*(SessionOptions**))                                           \
  F(SetSessionLogSeverityLevel, 22, Status*(SessionOptions*, int level))                           \
  F(SetIntraOpNumThreads, 24, Status*(SessionOptions*, int threads))                               \
  F(SessionGetInputCount, 30, Status*(const Session*, std::size_t*))                               \
  F(SessionGetOutputCount, 31, Status*(const Session*, std::size_t*))                              \
  F(SessionGetOverridableInitializerCount, 32, Status*(const Session*, std::size_t*))              \
  F(SessionGetInputTypeInfo, 33, Status*(const Session*, std::size_t index, TypeInfo**))           \
  F(SessionGetInputName, 36, Status*(const Session*, std::size_t index, Allocator*, char** name))  \
  F(SessionGetOutputName, 37, Status*(const Session*, std::size_t index, Allocator*, char** name)) \
  F(SessionGetOverridableInitializerName, 38,                                                      \
    Status*(const Session*, std::size_t index, Allocator*, char** name))                           \
  F(CreateRunOptions, 39, Status*(RunOptions**))                                                   \
  F(CreateTensorWithDataAsOrtValue, 49,                                                            \
    Status*(const MemoryInfo*, void* data, std::size_t bytes, const int64_t* dims,                 \
            std::size_t rank, ElementType, Value**))                                               \
  F(CastTypeInfoToTensorInfo, 55, Status*(const TypeInfo*, const TensorTypeAndShapeInfo**))        \
  F(CreateMemoryInfo, 68,                                                                          \
    Status*(const char* name, AllocatorType, int device, MemoryType, MemoryInfo**))                \
  F(CreateCpuMemoryInfo, 69, Status*(AllocatorType, MemoryType, MemoryInfo**))                     \
  F(AllocatorFree, 76, Status*(Allocator*, void*))                                                 \
  F(GetAllocatorWithDefaultOptions, 78, Status*(Allocator**))                                      \
  F(ReleaseEnv, 92, void(Env*))                                                                    \
  F(ReleaseMemoryInfo, 94, void(MemoryInfo*))                                                      \
  F(ReleaseSession, 95, void(Session*))                                                            \
  F(ReleaseValue, 96, void(Value*))                                                                \
  F(ReleaseRunOptions, 97, void(RunOptions*))                                                      \
  F(ReleaseTypeInfo, 98, void(TypeInfo*))                                                          \
  F(ReleaseSessionOptions, 100, void(SessionOptions*))                                             \
  F(GetAvailableProviders, 125, Status*(char*** names, int* count))                                \
  F(ReleaseAvailableProviders, 126, Status*(char** names, int count))                              \
  F(RunWithBinding, 133, Status*(Session*, const RunOptions*, const IoBinding*))                   \
  F(CreateIoBinding, 134, Status*(Session*, IoBinding**))                                          \
  F(ReleaseIoBinding, 135, void(IoBinding*))                                                       \
  F(BindInput, 136, Status*(IoBinding*, const char* name, const Value*))                           \
  F(BindOutput, 137, Status*(IoBinding*, const char* name, const Value*))                          \
  F(BindOutputToDevice, 138, Status*(IoBinding*, const char* name, const MemoryInfo*))             \
  F(GetBoundOutputValues, 140,                                                                     \
    Status*(const IoBinding*, Allocator*, Value*** values, std::size_t* count))                    \
  F(AddRunConfigEntry, 165, Status*(RunOptions*, const char* key, const char* value))              \
  F(SessionOptionsAppendExecutionProvider_CUDA_V2, 204,                                            \
    Status*(SessionOptions*, const CudaProviderOptions*))                                          \
  F(CreateCUDAProviderOptions, 205, Status*(CudaProviderOptions**))                                \
  F(ReleaseCUDAProviderOptions, 208, void(CudaProviderOptions*))                                   \
  F(RegisterCustomOpsLibrary_V2, 228, Status*(SessionOptions*, const char* path))

struct CustomOp;
#define BIVLM_DECLARE_API_FUNCTION(name, slot, ...) using name = ApiFunction<slot, __VA_ARGS__>;
BIVLM_ORT_API_FUNCTIONS(BIVLM_DECLARE_API_FUNCTION)
BIVLM_ORT_GPU_FUNCTIONS(BIVLM_DECLARE_API_FUNCTION)
BIVLM_ORT_SESSION_FUNCTIONS(BIVLM_DECLARE_API_FUNCTION)
#undef BIVLM_DECLARE_API_FUNCTION

// OrtCustomOp as of version 17. Members that stay null are not used by ONNX Runtime, because those
// with the suffix V2 take their place or because no input or output is variadic.
struct CustomOp {
  uint32_t version = kApiVersion;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*) = nullptr;
  const char* (*GetName)(const CustomOp*) = nullptr;
  const char* (*GetExecutionProviderType)(const CustomOp*) = nullptr;
  ElementType (*GetInputType)(const CustomOp*, std::size_t index) = nullptr;
  std::size_t (*GetInputTypeCount)(const CustomOp*) = nullptr;
  ElementType (*GetOutputType)(const CustomOp*, std::size_t index) = nullptr;
  std::size_t (*GetOutputTypeCount)(const CustomOp*) = nullptr;
  void (*KernelCompute)(void* kernel, KernelContext*) = nullptr;
  void (*KernelDestroy)(void* kernel) = nullptr;
  Characteristic (*GetInputCharacteristic)(const CustomOp*, std::size_t index) = nullptr;
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, std::size_t index) = nullptr;
  MemoryType (*GetInputMemoryType)(const CustomOp*, std::size_t index) = nullptr;
  int (*GetVariadicInputMinArity)(const CustomOp*) = nullptr;
  int (*GetVariadicInputHomogeneity)(const CustomOp*) = nullptr;
  int (*GetVariadicOutputMinArity)(const CustomOp*) = nullptr;
  int (*GetVariadicOutputHomogeneity)(const CustomOp*) = nullptr;
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*,
                            void** kernel) = nullptr;
  Status* (*KernelComputeV2)(void* kernel, KernelContext*) = nullptr;
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeInferContext*) = nullptr;
  int (*GetStartVersion)(const CustomOp*) = nullptr;
  int (*GetEndVersion)(const CustomOp*) = nullptr;
};
static_assert(sizeof(CustomOp) == 22 * sizeof(void*));

}  // namespace bivlm::ort

#endif  // BIVLM_ORT_ABI_H_
