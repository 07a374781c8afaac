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
constexpr int64_t kGrowth = 256;  // positions that a full cache gains
constexpr std::size_t kCacheLine = 64;

std::size_t ElementSize(ort::ElementType type) {
  return type == ort::ElementType::kFloat16 ? 2 : type == ort::ElementType::kInt64 ? 8 : 4;
}

std::string ProgramFolder() {
  std::string path(PATH_MAX, '\0');
  const ssize_t length = readlink("/proc/self/exe", path.data(), path.size());
  if (length <= 0) return ".";
  path.resize(static_cast<std::size_t>(length));
  return path.substr(0, path.find_last_of('/'));
}

std::string LibraryPath(const std::string& given) {
  const char* variable = std::getenv(kLibraryVariable);  // NOLINT(concurrency-mt-unsafe)
  std::string path = ProgramFolder() + "/" + kLibraryName;
  if (variable != nullptr && *variable != '\0') path = variable;
  if (!given.empty()) path = given;
  if (!IsFile(path)) {
    throw RequestError("the operator library '" + path +
                       "' is not there. Name it with --library FILE or " + kLibraryVariable +
                       ", put it beside bivlm-device, or run the model without it "
                       "(--no-custom-ops).");
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

std::string TooLong(int64_t tokens, int64_t context) {
  return std::to_string(tokens) + " tokens do not fit into the context: the model takes " +
         std::to_string(context) + " in all. Shorten the prompt or the answer.";
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
  if (manifest_.uses_custom_ops && options.custom_ops) {
    const std::string library = LibraryPath(options.library);
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

// One run of the graph with all memory bound: the cache in place, ids, positions, logits.
class BoundRun {
 public:
  BoundRun(const KvCache& cache, std::size_t count, const PixelBatch& pixels, bool kept)
      : session_(cache.session_), is_kept_bound_(kept), token_ids_(count) {
    const OrtRuntime& runtime = session_.runtime();
    const Manifest& manifest = session_.manifest();
    ort::IoBinding* made = nullptr;
    runtime.Check(ort::CreateIoBinding::Call(runtime.api(), session_.ort(), &made));
    binding_ = OwnedBinding(made, {runtime.api()});
    const auto tokens = static_cast<int64_t>(count);
    Input("input_ids", ort::ElementType::kInt64, {1, tokens}, token_ids_.data(), count * 8);
    positions_.resize(manifest.image_grid.has_value() ? 3 * count : count);
    std::vector<int64_t> dims = {1, tokens};
    if (manifest.image_grid.has_value()) dims.insert(dims.begin(), 3);
    Input("position_ids", ort::ElementType::kInt64, dims, positions_.data(), positions_.size() * 8);
    Input("past_length", ort::ElementType::kInt64, {}, &past_length_, 8);
    if (session_.keep_tokens().has_value()) {
      keep_tokens_ = *session_.keep_tokens();
      Input("keep_tokens", ort::ElementType::kInt64, {}, &keep_tokens_, 8);
    }
    const ort::ElementType type = session_.element_type();
    SetPixels(pixels, type);
    const auto& [channels, height, width] = manifest.pixel_shape;
    Input("pixel_values", type, {pixels.images, channels, height, width}, pixels_.data(),
          pixels.values.size() * ElementSize(type));
    const auto vocabulary = static_cast<std::size_t>(manifest.vocab_size);
    logits_.resize(vocabulary * ElementSize(type));
    values_.push_back(
        TensorView(runtime, type, {1, 1, manifest.vocab_size}, logits_.data(), logits_.size()));
    runtime.Check(ort::BindOutput::Call(runtime.api(), made, "logits", values_.back().get()));
    if (kept) {
      runtime.Check(
          ort::BindOutputToDevice::Call(runtime.api(), made, "kept_indices", runtime.memory()));
    }
    for (std::size_t i = 0; i < cache.tensors_.size(); ++i) {
      const std::string& past = session_.past_names()[i];
      const std::string present = "present" + past.substr(std::strlen("past_key_values"));
      const ort::Value* tensor = cache.tensors_[i].get();
      runtime.Check(ort::BindInput::Call(runtime.api(), made, past.c_str(), tensor));
      runtime.Check(ort::BindOutput::Call(runtime.api(), made, present.c_str(), tensor));
    }
  }

  const void* logits() const { return logits_.data(); }

  void Run(const std::vector<int64_t>& token_ids, const std::vector<int64_t>& positions,
           int64_t past_length) {
    const OrtRuntime& runtime = session_.runtime();
    std::copy(token_ids.begin(), token_ids.end(), token_ids_.begin());
    std::copy(positions.begin(), positions.end(), positions_.begin());
    past_length_ = past_length;
    runtime.Check(
        ort::RunWithBinding::Call(runtime.api(), session_.ort(), nullptr, binding_.get()));
  }

  // Of the last run; a single token is always kept.
  std::vector<int64_t> KeptIndices() const {
    if (!is_kept_bound_) return {0};
    const OrtRuntime& runtime = session_.runtime();
    const ort::Api* api = runtime.api();
    ort::Value** bound = nullptr;
    std::size_t count = 0;
    runtime.Check(
        ort::GetBoundOutputValues::Call(api, binding_.get(), runtime.allocator(), &bound, &count));
    std::vector<OwnedValue> owned;
    for (std::size_t i = 0; i < count; ++i)
      owned.emplace_back(bound[i], Releaser<ort::Value, ort::ReleaseValue>{api});
    runtime.Check(ort::AllocatorFree::Call(api, runtime.allocator(), bound));
    ort::Value* kept = owned.at(1).get();  // outputs come in the order in which they were bound
    ort::TensorTypeAndShapeInfo* info = nullptr;
    runtime.Check(ort::GetTensorTypeAndShape::Call(api, kept, &info));
    std::vector<int64_t> dims(2);
    ort::Status* const status = ort::GetDimensions::Call(api, info, dims.data(), dims.size());
    ort::ReleaseTensorTypeAndShapeInfo::Call(api, info);
    runtime.Check(status);
    void* data = nullptr;
    runtime.Check(ort::GetTensorMutableData::Call(api, kept, &data));
    const auto* indices = static_cast<const int64_t*>(data);
    return {indices, indices + dims[1]};
  }

 private:
  void Input(const char* name, ort::ElementType type, const std::vector<int64_t>& dims, void* data,
             std::size_t bytes) {
    const OrtRuntime& runtime = session_.runtime();
    values_.push_back(TensorView(runtime, type, dims, data, bytes));
    runtime.Check(ort::BindInput::Call(runtime.api(), binding_.get(), name, values_.back().get()));
  }

  void SetPixels(const PixelBatch& pixels, ort::ElementType type) {
    pixels_.resize(std::max<std::size_t>(1, pixels.values.size() * ElementSize(type)));
    if (type == ort::ElementType::kFloat32) {
      std::copy_n(reinterpret_cast<const char*>(pixels.values.data()),
                  pixels.values.size() * sizeof(float), pixels_.data());
      return;
    }
    for (std::size_t i = 0; i < pixels.values.size(); ++i) {
      const uint16_t half = HalfFromFloat(pixels.values[i]);
      std::memcpy(pixels_.data() + 2 * i, &half, sizeof(half));
    }
  }

  const Session& session_;
  bool is_kept_bound_;
  std::vector<int64_t> token_ids_;
  std::vector<int64_t> positions_;
  int64_t past_length_ = 0;
  int64_t keep_tokens_ = 0;
  std::vector<char> pixels_;
  std::vector<char> logits_;
  std::vector<OwnedValue> values_;  // views of the members above
  OwnedBinding binding_;
};

KvCache::KvCache(const Session& session, int64_t capacity) : session_(session) {
  Require(capacity);
  Allocate(capacity);
}

KvCache::~KvCache() = default;

std::size_t KvCache::used_bytes() const {
  return static_cast<std::size_t>(tokens_) * session_.cache_bytes_per_token();
}

std::size_t KvCache::allocated_bytes() const {
  return static_cast<std::size_t>(capacity_) * session_.cache_bytes_per_token();
}

void KvCache::Require(int64_t tokens) const {
  const int64_t context = session_.manifest().context_length;
  if (tokens > context) throw RequestError(TooLong(tokens, context));
}

void KvCache::Reserve(int64_t tokens) {
  Require(tokens);
  if (tokens <= capacity_) return;
  Allocate(std::min(session_.manifest().context_length, std::max(tokens, capacity_ + kGrowth)));
}

void KvCache::Allocate(int64_t capacity) {
  const Manifest& manifest = session_.manifest();
  const std::size_t row =
      static_cast<std::size_t>(manifest.head_dim) * ElementSize(session_.cache_type());
  const auto heads = static_cast<std::size_t>(manifest.kv_heads);
  const std::size_t bytes = heads * static_cast<std::size_t>(capacity) * row;
  decltype(memory_) memory;
  std::vector<char*> buffers;
  std::vector<OwnedValue> tensors;
  for (std::size_t i = 0; i < session_.past_names().size(); ++i) {
    // calloc: the system hands out zeroed pages when they are written
    memory.emplace_back(std::calloc(bytes + kCacheLine, 1), std::free);
    if (memory.back() == nullptr) {
      throw RequestError("there is no memory for a KV cache of " + std::to_string(capacity) +
                         " tokens. Shorten the prompt or the answer.");
    }
    const auto address = reinterpret_cast<uintptr_t>(memory.back().get());
    char* const buffer = static_cast<char*>(memory.back().get()) + (0 - address) % kCacheLine;
    for (std::size_t head = 0; head < heads && tokens_ > 0; ++head) {
      std::memcpy(buffer + head * static_cast<std::size_t>(capacity) * row,
                  buffers_[i] + head * static_cast<std::size_t>(capacity_) * row,
                  static_cast<std::size_t>(tokens_) * row);
    }
    buffers.push_back(buffer);
    tensors.push_back(TensorView(session_.runtime(), session_.cache_type(),
                                 {1, manifest.kv_heads, capacity, manifest.head_dim}, buffer,
                                 bytes));
  }
  single_.reset();
  last_.reset();
  tensors_ = std::move(tensors);
  buffers_ = std::move(buffers);
  memory_ = std::move(memory);
  capacity_ = capacity;
}

KvCache::Step KvCache::Run(const std::vector<int64_t>& token_ids, const PixelBatch& pixels) {
  const Manifest& manifest = session_.manifest();
  const auto count = static_cast<int64_t>(token_ids.size());
  if (position_ + count > manifest.context_length) {
    throw RequestError(TooLong(position_ + count, manifest.context_length));
  }
  Reserve(tokens_ + count);
  const bool is_single = count == 1 && pixels.images == 0;
  if (is_single) last_.reset();  // the pixels of a prefill are not needed any more
  std::unique_ptr<BoundRun>& run = is_single ? single_ : last_;
  if (!is_single || run == nullptr) {
    run = std::make_unique<BoundRun>(*this, token_ids.size(), pixels, !is_single);
  }
  const Positions positions = PositionRows(token_ids, position_, manifest);
  Step step;
  try {
    run->Run(token_ids, positions.values, tokens_);
    step = {run->logits(), run->KeptIndices()};
  } catch (const OrtError& error) {
    throw InputError("'" + session_.paths().graph + "' failed in ONNX Runtime on " +
                     std::to_string(count) + " tokens behind " + std::to_string(tokens_) +
                     " cached ones: " + error.what() + ".");
  }
  tokens_ += static_cast<int64_t>(step.kept.size());
  position_ = positions.next;
  return step;
}

Positions PositionRows(const std::vector<int64_t>& token_ids, int64_t start,
                       const Manifest& manifest) {
  const std::size_t count = token_ids.size();
  const std::size_t axes = manifest.image_grid.has_value() ? 3 : 1;
  Positions found{std::vector<int64_t>(axes * count), start};
  std::size_t index = 0;
  while (index < count) {
    if (axes == 1 || token_ids[index] != manifest.image_token_id) {
      for (std::size_t axis = 0; axis < axes; ++axis) {
        found.values[axis * count + index] = found.next;
      }
      ++index;
      ++found.next;
      continue;
    }
    const auto [rows, columns] = *manifest.image_grid;
    const auto cells = static_cast<std::size_t>(rows * columns);
    for (std::size_t cell = 0; cell < cells && index + cell < count; ++cell) {
      const auto place = static_cast<int64_t>(cell);
      found.values[index + cell] = found.next;
      found.values[count + index + cell] = found.next + place / columns;
      found.values[2 * count + index + cell] = found.next + place % columns;
    }
    index += cells;
    found.next += std::max(rows, columns);
  }
  return found;
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
