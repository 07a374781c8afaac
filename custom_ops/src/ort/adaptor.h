// What the operators need of ONNX Runtime's C API. Inside, failures are exceptions; Guard turns
// them into statuses at the edge.
#ifndef BIVLM_ORT_ADAPTOR_H_
#define BIVLM_ORT_ADAPTOR_H_

#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "bivlm/ort_abi.h"
#include "bivlm/parallel.h"

namespace bivlm::ort {

// A status of ONNX Runtime on its way to the edge; Guard hands it on.
class StatusError : public std::exception {
 public:
  explicit StatusError(Status* status) : status_(status) {}
  Status* status() const { return status_; }

 private:
  Status* status_;
};

// A request that does not follow OPS.md.
class InvalidArgument : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws InvalidArgument unless `problem` is "".
inline void Require(const std::string& problem) {
  if (!problem.empty()) throw InvalidArgument(problem);
}

inline int64_t Signed(std::size_t value) { return static_cast<int64_t>(value); }

inline void Check(Status* status) {
  if (status != nullptr) throw StatusError(status);
}

// body(), with exceptions turned into a status. `where` names the operator and node.
template <typename Body>
Status* Guard(const Api* api, const std::string& where, const Body& body) noexcept {
  try {
    try {
      body();
      return nullptr;
    } catch (const StatusError& error) {
      return error.status();
    } catch (const InvalidArgument& error) {
      const std::string message = where + ": " + error.what();
      return CreateStatus::Call(api, ErrorCode::kInvalidArgument, message.c_str());
    }
  } catch (const std::bad_alloc&) {
    return CreateStatus::Call(api, ErrorCode::kFail, "bivlm_custom_ops: out of memory");
  } catch (const std::exception& error) {
    return CreateStatus::Call(api, ErrorCode::kRuntimeException, error.what());
  }
}

// The session's own threads, as an Executor. Lives for one compute call.
class SessionThreads {
 public:
  SessionThreads(const Api* api, const KernelContext* context) : api_(api), context_(context) {}
  Executor executor() { return {Run, this}; }

 private:
  static void Run(void* pool, std::size_t total, void (*body)(void*, std::size_t), void* context);

  const Api* api_;
  const KernelContext* context_;
};

using Dims = std::vector<int64_t>;

struct Tensor {
  ElementType type = ElementType::kUndefined;
  Dims dims;
  const void* data = nullptr;  // null: the optional input is missing

  explicit operator bool() const { return data != nullptr; }
};

// "[2, 3]"; unknown sizes as "?".
std::string Text(const Dims& dims);
std::string Text(ElementType type);

// "" or what differs from `dims` and `type`.
std::string Mismatch(const char* name, const Tensor& tensor, ElementType type, const Dims& dims);

// A tensor that stays where it is. A null `value` gives a missing tensor. The data of an empty
// tensor is a pointer that is not null.
Tensor View(const Api* api, const Value* value);
Tensor Input(const Api* api, const KernelContext* context, std::size_t index);
void* Output(const Api* api, KernelContext* context, std::size_t index, const Dims& dims);

// Whether the node has the optional input `index`.
bool HasInput(const Api* api, const KernelInfo* info, std::size_t index);

// The constant input `index` of a node, or a missing tensor if it is missing or not constant.
Tensor ConstantInput(const Api* api, const KernelInfo* info, std::size_t index);

// Attributes; `fallback` where the node has none of that name. They throw InvalidArgument if it has
// one of another type.
int64_t IntAttribute(const Api* api, const KernelInfo* info, const char* name, int64_t fallback);
float FloatAttribute(const Api* api, const KernelInfo* info, const char* name, float fallback);
std::string StringAttribute(const Api* api, const KernelInfo* info, const char* name,
                            const char* fallback);
std::vector<int64_t> IntsAttribute(const Api* api, const KernelInfo* info, const char* name);
int64_t RequiredInt(const Api* api, const KernelInfo* info, const char* name);

// "BinaryMatMul node 'name'".
std::string NodeLabel(const Api* api, const KernelInfo* info, const char* op);

// BIVLM_FORCE_KERNEL, or "".
std::string ForcedKernel();

// What is wrong with BIVLM_FORCE_KERNEL when no kernel has that name.
std::string ForcedKernelProblem(const std::string& forced, const std::string& available);

// Element type and shape of an input, or those of an output, during shape inference. Unknown sizes
// are -1; sizes of the same name are equal.
struct InferredShape {
  ElementType type = ElementType::kUndefined;
  Dims dims;
  std::vector<std::string> names;
  bool known = false;
};
InferredShape InferenceInput(const Api* api, const ShapeInferContext* context, std::size_t index);
void SetInferenceOutput(const Api* api, const ShapeInferContext* context, std::size_t index,
                        const InferredShape& shape);

// A name for an unknown size that no other size has: ONNX Runtime reuses the memory of a tensor for
// another one of the same names.
std::string UniqueSizeName(const char* prefix);

int64_t InferenceInt(const Api* api, const ShapeInferContext* context, const char* name);

}  // namespace bivlm::ort

#endif  // BIVLM_ORT_ADAPTOR_H_
