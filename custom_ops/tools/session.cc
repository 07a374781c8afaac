#include "session.h"

#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "bivlm/float16.h"
#include "error.h"
#include "files.h"

namespace bivlm::device {
namespace {

constexpr char kLibraryVariable[] = "BIVLM_OPS_LIBRARY";
constexpr char kLibraryName[] = "libbivlm_custom_ops.so";
constexpr char kCudaLibraryVariable[] = "BIVLM_CUDA_OPS_LIBRARY";
constexpr char kCudaLibraryName[] = "libbivlm_custom_ops_cuda.so";
constexpr char kCudaProvider[] = "CUDAExecutionProvider";

std::string ProgramFolder() {
  std::string path(PATH_MAX, '\0');
  const ssize_t length = readlink("/proc/self/exe", path.data(), path.size());
  if (length <= 0) return ".";
  path.resize(static_cast<std::size_t>(length));
  return path.substr(0, path.find_last_of('/'));
}

std::string LibraryPath(const Session::Options& options) {
  const char* name = options.cuda ? kCudaLibraryVariable : kLibraryVariable;
  const char* variable = std::getenv(name);  // NOLINT(concurrency-mt-unsafe)
  std::string path = ProgramFolder() + "/" + (options.cuda ? kCudaLibraryName : kLibraryName);
  if (variable != nullptr && *variable != '\0') path = variable;
  if (!options.library.empty()) path = options.library;
  if (!IsFile(path)) {
    throw RequestError(
        "the operator library '" + path + "' is not there. Name it with --library FILE or " + name +
        ", put it beside bivlm-device, or " +
        (options.cuda ? "use --provider cpu." : "run the model without it (--no-custom-ops)."));
  }
  return path;
}

bool HasOverloads(const std::string& version) {
  int major = 0;
  int minor = 0;
  if (std::sscanf(version.c_str(), "%d.%d", &major, &minor) != 2) return true;
  return major > 1 || (major == 1 && minor >= 27);
}

bool Contains(const std::vector<std::string>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// ceil(tokens * fraction), at least 1; see bivlm_edge/pruning.py.
int64_t TokensToKeep(double fraction, int64_t tokens) {
  const auto kept = static_cast<int64_t>(std::ceil(static_cast<double>(tokens) * fraction - 1e-6));
  return std::min(tokens, std::max<int64_t>(1, kept));
}

std::string Shown(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

}  // namespace

Session::Session(const OrtRuntime& runtime, const BundlePaths& paths, const Options& options)
    : runtime_(runtime), paths_(paths), manifest_(ReadBundle(paths)) {
  if (options.threads.has_value() && *options.threads < 1) {
    throw RequestError("--threads " + std::to_string(*options.threads) +
                       " is not a number of threads. Give 1 or more.");
  }
  Create(options);
  for (int layer = 0; layer < manifest_.layers; ++layer) {
    for (const char* part : {".key", ".value"}) {
      past_names_.push_back("past_key_values." + std::to_string(layer) + part);
    }
  }
  CheckSignature();
  if (!options.fraction.has_value()) return;
  if (!(*options.fraction > 0.0 && *options.fraction <= 1.0)) {
    throw RequestError("--keep-tokens " + Shown(*options.fraction) +
                       " is not a fraction in (0, 1]. 0.25 keeps a quarter of the image tokens.");
  }
  if (!Contains(OptionalInputNames(), "keep_tokens")) {
    throw RequestError("'" + paths_.graph +
                       "' was exported without pruning, so that the number of image tokens cannot "
                       "be chosen. Export it with --keep-tokens 0.5 (any fraction below 1; it is "
                       "only the default).");
  }
  keep_tokens_ = TokensToKeep(*options.fraction, manifest_.image_tokens);
}

void Session::Create(const Options& options) {
  const ort::Api* api = runtime_.api();
  ort::SessionOptions* made = nullptr;
  runtime_.Check(ort::CreateSessionOptions::Call(api, &made));
  const OwnedOptions owned(made, {api});
  runtime_.Check(ort::SetSessionLogSeverityLevel::Call(
      api, made, static_cast<int>(ort::LoggingLevel::kFatal)));
  if (options.threads.has_value()) {
    runtime_.Check(ort::SetIntraOpNumThreads::Call(api, made, *options.threads));
  }
  if (options.cuda) AppendCuda(made);
  RegisterLibrary(options, made);
  ort::Session* session = nullptr;
  try {
    runtime_.Check(
        ort::CreateSession::Call(api, runtime_.env(), paths_.graph.c_str(), made, &session));
  } catch (const OrtError& error) {
    const std::string text = error.what();
    if (text.find("BIVLM_FORCE_KERNEL") != std::string::npos ||
        text.find("BIVLM_HUGE_PAGES") != std::string::npos) {
      throw RequestError(text + ".");
    }
    throw InputError("ONNX Runtime " + runtime_.version() + " does not load '" + paths_.graph +
                     "': " + text + ". Export the model again, or take a newer ONNX Runtime.");
  }
  session_ = OwnedSession(session, {api});
}

void Session::RegisterLibrary(const Options& options, ort::SessionOptions* made) {
  const ort::Api* api = runtime_.api();
  if (options.cuda && manifest_.uses_custom_ops && manifest_.fallback == "none") {
    throw RequestError(
        "'" + paths_.graph +
        "' was exported with --fallback none: on CUDA its attention and head run by the "
        "fallback in ONNX Runtime's operators. Use --provider cpu.");
  }
  if (manifest_.uses_custom_ops && options.custom_ops) {
    const std::string library = LibraryPath(options);
    operators_ = "library";
    try {
      runtime_.Check(ort::RegisterCustomOpsLibrary_V2::Call(api, made, library.c_str()));
    } catch (const OrtError& error) {
      throw RequestError("the operator library '" + library + "' does not load into ONNX Runtime " +
                         runtime_.version() + ": " + error.what() +
                         ". Build it again for this machine, or run the model without it "
                         "(--no-custom-ops).");
    }
  } else if (manifest_.uses_custom_ops) {
    operators_ = "fallback";
    if (manifest_.fallback == "none") {
      throw RequestError("'" + paths_.graph +
                         "' was exported with --fallback none: its operators exist only in the "
                         "library. Run it without --no-custom-ops.");
    }
    if (!HasOverloads(runtime_.version())) {
      throw RequestError("ONNX Runtime " + runtime_.version() +
                         " picks the wrong function bodies for the operators of '" + paths_.graph +
                         "': give 1.27 or newer, or run without --no-custom-ops.");
    }
  }
}

// Asks for the CUDA provider; unlike in Python ONNX Runtime refuses if it cannot have it.
void Session::AppendCuda(ort::SessionOptions* made) {
  const ort::Api* api = runtime_.api();
  gpu_ = std::make_unique<Gpu>();
  char** names = nullptr;
  int count = 0;
  runtime_.Check(ort::GetAvailableProviders::Call(api, &names, &count));
  const bool is_built =
      std::find(names, names + count, std::string(kCudaProvider)) != names + count;
  runtime_.Check(ort::ReleaseAvailableProviders::Call(api, names, count));
  if (!is_built) {
    throw RequestError("--provider cuda: this ONNX Runtime " + runtime_.version() +
                       " was built without " + kCudaProvider +
                       ". Name one that has it with --onnxruntime FILE (for a Jetson see "
                       "docs/JETSON.md), or use --provider cpu.");
  }
  try {
    ort::CudaProviderOptions* options = nullptr;
    runtime_.Check(ort::CreateCUDAProviderOptions::Call(api, &options));
    const Owned<ort::CudaProviderOptions, ort::ReleaseCUDAProviderOptions> owned(options, {api});
    runtime_.Check(ort::SessionOptionsAppendExecutionProvider_CUDA_V2::Call(api, made, options));
  } catch (const OrtError& error) {
    throw RequestError(std::string("--provider cuda: the ") + kCudaProvider + " of ONNX Runtime " +
                       runtime_.version() + " does not start: " + error.what() +
                       ". Install the CUDA libraries and cuDNN that it was built for, where the "
                       "loader finds them, or use --provider cpu.");
  }
  ort::MemoryInfo* memory = nullptr;
  runtime_.Check(ort::CreateMemoryInfo::Call(api, "Cuda", ort::AllocatorType::kDevice, 0,
                                             ort::MemoryType::kDefault, &memory));
  gpu_memory_ = OwnedMemoryInfo(memory, {api});
}

const ort::MemoryInfo* Session::cache_memory() const {
  return cache_type_ == ort::ElementType::kFloat16 ? gpu_memory_.get() : nullptr;
}

std::vector<std::string> Session::InputNames() const {
  std::size_t count = 0;
  runtime_.Check(ort::SessionGetInputCount::Call(runtime_.api(), session_.get(), &count));
  std::vector<std::string> names;
  for (std::size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    runtime_.Check(ort::SessionGetInputName::Call(runtime_.api(), session_.get(), i,
                                                  runtime_.allocator(), &name));
    names.push_back(runtime_.Take(name));
  }
  return names;
}

std::vector<std::string> Session::OutputNames() const {
  std::size_t count = 0;
  runtime_.Check(ort::SessionGetOutputCount::Call(runtime_.api(), session_.get(), &count));
  std::vector<std::string> names;
  for (std::size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    runtime_.Check(ort::SessionGetOutputName::Call(runtime_.api(), session_.get(), i,
                                                   runtime_.allocator(), &name));
    names.push_back(runtime_.Take(name));
  }
  return names;
}

std::vector<std::string> Session::OptionalInputNames() const {
  std::size_t count = 0;
  runtime_.Check(
      ort::SessionGetOverridableInitializerCount::Call(runtime_.api(), session_.get(), &count));
  std::vector<std::string> names;
  for (std::size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    runtime_.Check(ort::SessionGetOverridableInitializerName::Call(runtime_.api(), session_.get(),
                                                                   i, runtime_.allocator(), &name));
    names.push_back(runtime_.Take(name));
  }
  return names;
}

ort::ElementType Session::InputType(std::size_t index) const {
  const ort::Api* api = runtime_.api();
  ort::TypeInfo* made = nullptr;
  runtime_.Check(ort::SessionGetInputTypeInfo::Call(api, session_.get(), index, &made));
  const OwnedTypeInfo owned(made, {api});
  const ort::TensorTypeAndShapeInfo* tensor = nullptr;  // part of `made`
  runtime_.Check(ort::CastTypeInfoToTensorInfo::Call(api, made, &tensor));
  ort::ElementType type = ort::ElementType::kUndefined;
  if (tensor != nullptr) runtime_.Check(ort::GetTensorElementType::Call(api, tensor, &type));
  return type;
}

void Session::CheckSignature() {
  if (!Contains(OptionalInputNames(), "past_length")) {
    throw InputError("'" + paths_.graph +
                     "' has no optional input past_length: it is no graph of bivlm-edge, or was "
                     "exported before the KV cache was written in place. Export it again.");
  }
  const std::vector<std::string> inputs = InputNames();
  const std::vector<std::string> outputs = OutputNames();
  std::vector<std::string> wanted_inputs = {"input_ids", "pixel_values", "position_ids"};
  std::vector<std::string> wanted_outputs = {"logits", "kept_indices"};
  for (const std::string& past : past_names_) {
    wanted_inputs.push_back(past);
    wanted_outputs.push_back("present" + past.substr(std::strlen("past_key_values")));
  }
  std::string differ;
  const auto compare = [&differ](const std::vector<std::string>& these,
                                 const std::vector<std::string>& those) {
    for (const std::string& name : these) {
      if (!Contains(those, name)) differ += (differ.empty() ? "" : ", ") + name;
    }
  };
  compare(wanted_inputs, inputs);
  compare(inputs, wanted_inputs);
  compare(wanted_outputs, outputs);
  if (!differ.empty()) {
    throw InputError("'" + paths_.graph +
                     "' has other inputs and outputs than its manifest says; they differ in " +
                     differ + ". Copy all parts of one export together.");
  }
  const auto place = std::find(inputs.begin(), inputs.end(), past_names_.at(0));
  cache_type_ = InputType(static_cast<std::size_t>(place - inputs.begin()));
  if (cache_type_ != ort::ElementType::kFloat16 && cache_type_ != ort::ElementType::kFloat32) {
    throw InputError("'" + paths_.graph +
                     "' has a KV cache that is neither float16 nor float32. Export it again.");
  }
}

ort::ElementType Session::element_type() const {
  return manifest_.dtype == "fp16" ? ort::ElementType::kFloat16 : ort::ElementType::kFloat32;
}

std::size_t Session::cache_bytes_per_token() const {
  return 2 * static_cast<std::size_t>(manifest_.layers * manifest_.kv_heads * manifest_.head_dim) *
         ElementSize(cache_type_);
}

int64_t Greedy(const Session& session, const void* logits) {
  const bool is_half = session.element_type() == ort::ElementType::kFloat16;
  const auto value = [&](int64_t index) {
    if (is_half) return LoadHalf(static_cast<const char*>(logits) + 2 * index);
    return static_cast<const float*>(logits)[index];
  };
  int64_t best = 0;
  for (int64_t index = 0; index < session.manifest().vocab_size; ++index) {
    if (std::isnan(value(index))) {
      best = index;
      break;
    }
    if (value(index) > value(best)) best = index;
  }
  if (!std::isfinite(value(best))) {
    throw InputError(
        "the model computed " + Shown(value(best)) +
        " as a logit, so no token can be chosen. If it was exported with --dtype fp16, "
        "export it with --dtype fp32.");
  }
  return best;
}

}  // namespace bivlm::device
