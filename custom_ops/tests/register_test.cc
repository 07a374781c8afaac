// The library as a runtime loads it: what it exports, and what it says to an ONNX Runtime that is
// too old. The runtimes here are stand-ins with the few functions that registering needs. With
// BIVLM_TEST_CUDA the library is the one for CUDA.
#include <dlfcn.h>

#include <string>

#include "bivlm/ort_abi.h"
#include "check.h"

namespace bivlm::testing {
namespace {

#ifdef BIVLM_TEST_CUDA
constexpr uint32_t kOldest = 18;
const std::vector<std::string> kOperators = {"BinaryMatMul", "GatedSiLU",  "GatedSiLU",
                                             "TokenPrune",   "TokenPrune", "TokenPrune",
                                             "TokenPrune",   "TokenPrune", "TokenPrune"};
#else
constexpr uint32_t kOldest = 17;
const std::vector<std::string> kOperators = {
    "BinaryMatMul",        "GroupMatMul", "GroupQueryAttention", "GroupQueryAttention",
    "GroupQueryAttention", "GatedSiLU",   "GatedSiLU",           "TokenPrune",
    "TokenPrune",          "TokenPrune",  "TokenPrune",          "TokenPrune",
    "TokenPrune"};
#endif

// What the stand-in has been asked for.
std::string status_message;
std::vector<std::string> op_names;
std::size_t ops_with_inference = 0;
std::string domain_name;
int domains_added = 0;
uint32_t newest_api = 0;

ort::Status* FakeCreateStatus(ort::ErrorCode, const char* message) {
  status_message = message;
  return reinterpret_cast<ort::Status*>(&status_message);
}

ort::Status* FakeCreateDomain(const char* name, ort::CustomOpDomain** domain) {
  domain_name = name;
  *domain = reinterpret_cast<ort::CustomOpDomain*>(&domain_name);
  return nullptr;
}

ort::Status* FakeAddOp(ort::CustomOpDomain*, const ort::CustomOp* op) {
  op_names.emplace_back(op->GetName(op));
  ops_with_inference += op->InferOutputShapeFn != nullptr ? 1 : 0;
  return nullptr;
}

ort::Status* FakeAddDomain(ort::SessionOptions*, ort::CustomOpDomain*) {
  ++domains_added;
  return nullptr;
}

template <typename Function>
void SetSlot(ort::Api* api, std::size_t slot, Function function) {
  api->slots[slot] = reinterpret_cast<void (*)()>(function);
}

// Two copies of ONNX Runtime: one before 1.24, one from there on.
const ort::Api* FakeGetApi(uint32_t version) {
  static ort::Api apis[2] = {};
  ort::Api* api = &apis[newest_api < 24 ? 0 : 1];
  SetSlot(api, ort::CreateStatus::kSlot, FakeCreateStatus);
  SetSlot(api, ort::CreateCustomOpDomain::kSlot, FakeCreateDomain);
  SetSlot(api, ort::CustomOpDomain_Add::kSlot, FakeAddOp);
  SetSlot(api, ort::AddCustomOpDomain::kSlot, FakeAddDomain);
  return version <= newest_api ? api : nullptr;
}

using RegisterFunction = ort::Status* (*)(ort::SessionOptions*, const ort::ApiBase*);

void OldRuntimeIsRefusedByName(Checker* check, RegisterFunction register_ops) {
  static const std::string version = "1." + std::to_string(kOldest - 1) + ".3";
  const ort::ApiBase base = {FakeGetApi, [] { return version.c_str(); }};
  newest_api = kOldest - 1;
  check->Expect(register_ops(nullptr, &base) != nullptr, "no status from ONNX Runtime ", version);
  for (const std::string& part : {"1." + std::to_string(kOldest), version}) {
    check->Expect(status_message.find(part) != std::string::npos, "'", status_message,
                  "' does not say ", part);
  }
}

void OperatorsAreAddedOncePerRuntime(Checker* check, RegisterFunction register_ops) {
  const ort::ApiBase base = {FakeGetApi, [] { return "1.31.1"; }};
  newest_api = 31;
  check->Expect(register_ops(nullptr, &base) == nullptr, "register failed");
  check->Expect(register_ops(nullptr, &base) == nullptr, "second register failed");
  check->Expect(domain_name == "ai.bivlm", "domain is ", domain_name);
  check->Expect(op_names == kOperators, op_names.size(), " operators added");
  check->Expect(domains_added == 2, "domain added to ", domains_added, " sessions of 2");
  check->Expect(ops_with_inference == kOperators.size(), ops_with_inference,
                " operators infer shapes");
}

// ONNX Runtime 1.20 to 1.23 would crash (see register.cc).
void NoShapeInferenceBefore124(Checker* check, RegisterFunction register_ops) {
  const ort::ApiBase base = {FakeGetApi, [] { return "1.23.2"; }};
  newest_api = 23;
  op_names.clear();
  ops_with_inference = 0;
  check->Expect(register_ops(nullptr, &base) == nullptr, "register failed");
  check->Expect(op_names.size() == kOperators.size(), op_names.size(), " operators added");
  check->Expect(ops_with_inference == 0, ops_with_inference, " operators infer shapes");
}

}  // namespace
}  // namespace bivlm::testing

int main() {
  using namespace bivlm::testing;  // NOLINT(google-build-using-namespace)
  Checker check;
  void* library = dlopen(BIVLM_LIBRARY, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());  // NOLINT(concurrency-mt-unsafe)
    return 1;
  }
  const auto register_ops = reinterpret_cast<RegisterFunction>(dlsym(library, "RegisterCustomOps"));
  check.Expect(register_ops != nullptr, "RegisterCustomOps is not exported");
  if (register_ops != nullptr) {
    OldRuntimeIsRefusedByName(&check, register_ops);
    OperatorsAreAddedOncePerRuntime(&check, register_ops);
    NoShapeInferenceBefore124(&check, register_ops);
  }
  return check.Finish("register_test");
}
