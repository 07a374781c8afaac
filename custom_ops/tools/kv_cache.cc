// The KV cache of a session, and the runs that write into it.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "bivlm/float16.h"
#include "error.h"
#include "session.h"

namespace bivlm::device {
namespace {

constexpr int64_t kGrowth = 256;  // positions that a full cache gains
constexpr std::size_t kCacheLine = 64;
constexpr char kArenaShrinkage[] = "memory.enable_memory_arena_shrinkage";

std::string TooLong(int64_t tokens, int64_t context) {
  return std::to_string(tokens) + " tokens do not fit into the context: the model takes " +
         std::to_string(context) + " in all. Shorten the prompt or the answer.";
}

}  // namespace

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
    SetOptions(count);
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
    if (session_.gpu() != nullptr) {  // what a GPU reads is copied there when it is bound
      for (const auto& input : inputs_) BindInput(input);
    }
    runtime.Check(
        ort::RunWithBinding::Call(runtime.api(), session_.ort(), options_.get(), binding_.get()));
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
  // What the activations of a prompt took on the CPU is not kept while its answer is written.
  void SetOptions(std::size_t count) {
    const OrtRuntime& runtime = session_.runtime();
    ort::RunOptions* made = nullptr;
    runtime.Check(ort::CreateRunOptions::Call(runtime.api(), &made));
    options_ = OwnedRunOptions(made, {runtime.api()});
    if (count == 1 || session_.gpu() != nullptr) return;
    runtime.Check(ort::AddRunConfigEntry::Call(runtime.api(), made, kArenaShrinkage, "cpu:0"));
  }

  void Input(const char* name, ort::ElementType type, const std::vector<int64_t>& dims, void* data,
             std::size_t bytes) {
    const OrtRuntime& runtime = session_.runtime();
    values_.push_back(TensorView(runtime, type, dims, data, bytes));
    inputs_.emplace_back(name, values_.back().get());
    BindInput(inputs_.back());
  }

  void BindInput(const std::pair<const char*, const ort::Value*>& input) {
    const OrtRuntime& runtime = session_.runtime();
    runtime.Check(ort::BindInput::Call(runtime.api(), binding_.get(), input.first, input.second));
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
  std::vector<std::pair<const char*, const ort::Value*>> inputs_;
  OwnedBinding binding_;
  OwnedRunOptions options_;
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

// Zeroed memory for one buffer of a cache of `capacity` tokens.
KvCache::Memory KvCache::NewMemory(std::size_t bytes, int64_t capacity) const {
  const Gpu* gpu = session_.cache_memory() == nullptr ? nullptr : session_.gpu();
  Memory memory(nullptr, [](void*) {});
  if (gpu != nullptr) {
    memory = Memory(gpu->Allocate(bytes), [gpu](void* pointer) { gpu->Free(pointer); });
  } else {
    // calloc: the system hands out zeroed pages when they are written
    memory = Memory(std::calloc(bytes + kCacheLine, 1), std::free);
  }
  if (memory == nullptr) {
    throw RequestError("there is no memory for a KV cache of " + std::to_string(capacity) +
                       " tokens. Shorten the prompt or the answer.");
  }
  return memory;
}

// Copies the tokens so far from a buffer of this cache to one with room for `capacity`.
void KvCache::CopyTokens(char* to, int64_t capacity, const char* from) const {
  const Manifest& manifest = session_.manifest();
  const std::size_t row =
      static_cast<std::size_t>(manifest.head_dim) * ElementSize(session_.cache_type());
  const std::size_t bytes = static_cast<std::size_t>(tokens_) * row;
  for (std::size_t head = 0; head < static_cast<std::size_t>(manifest.kv_heads); ++head) {
    char* const target = to + head * static_cast<std::size_t>(capacity) * row;
    const char* const source = from + head * static_cast<std::size_t>(capacity_) * row;
    if (session_.cache_memory() != nullptr) {
      session_.gpu()->Copy(target, source, bytes);
    } else {
      std::memcpy(target, source, bytes);
    }
  }
}

void KvCache::Allocate(int64_t capacity) {
  const Manifest& manifest = session_.manifest();
  const std::size_t row =
      static_cast<std::size_t>(manifest.head_dim) * ElementSize(session_.cache_type());
  const auto heads = static_cast<std::size_t>(manifest.kv_heads);
  const std::size_t bytes = heads * static_cast<std::size_t>(capacity) * row;
  const bool on_gpu = session_.cache_memory() != nullptr;
  decltype(memory_) memory;
  std::vector<char*> buffers;
  std::vector<OwnedValue> tensors;
  for (std::size_t i = 0; i < session_.past_names().size(); ++i) {
    memory.push_back(NewMemory(bytes, capacity));
    const auto address = reinterpret_cast<uintptr_t>(memory.back().get());
    char* const buffer =
        static_cast<char*>(memory.back().get()) + (on_gpu ? 0 : (0 - address) % kCacheLine);
    if (tokens_ > 0) CopyTokens(buffer, capacity, buffers_[i]);
    buffers.push_back(buffer);
    tensors.push_back(TensorView(session_.runtime(), session_.cache_type(),
                                 {1, manifest.kv_heads, capacity, manifest.head_dim}, buffer, bytes,
                                 session_.cache_memory()));
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

}  // namespace bivlm::device
