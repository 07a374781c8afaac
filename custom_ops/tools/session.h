// A bundle in ONNX Runtime: the graph, its KV cache in place, one run after the other.
#ifndef BIVLM_TOOLS_SESSION_H_
#define BIVLM_TOOLS_SESSION_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bundle.h"
#include "gpu.h"
#include "ort_runtime.h"

namespace bivlm::device {

// Pictures as the graph takes them: float32 [images, 3, H, W].
struct PixelBatch {
  int64_t images = 0;
  std::vector<float> values;
};

class Session {
 public:
  struct Options {
    std::string library;             // of the operators; "": beside the program
    bool custom_ops = true;          // false: the operators' fallback
    std::optional<int> threads;      // of one operator; none: ONNX Runtime's choice
    std::optional<double> fraction;  // of the image tokens to keep; none: as exported
    bool cuda = false;               // run on an NVIDIA GPU
  };

  // Throws Error if a file is missing or damaged, the library does not load or the graph is none
  // of this exporter, or an option is outside what is accepted.
  Session(const OrtRuntime& runtime, const BundlePaths& paths, const Options& options);

  const OrtRuntime& runtime() const { return runtime_; }
  const BundlePaths& paths() const { return paths_; }
  const Manifest& manifest() const { return manifest_; }
  ort::Session* ort() const { return session_.get(); }
  // The GPU that the graph runs on, or null: the CPU.
  const Gpu* gpu() const { return gpu_.get(); }
  // Where attention reads the KV cache on it, or null: on the host. ONNX Runtime's attention for
  // CUDA knows no float32.
  const ort::MemoryInfo* cache_memory() const;
  // What the operators run as: "library", "fallback" or "standard".
  const char* operators() const { return operators_; }
  // Tokens kept of each image; none: as the export says.
  std::optional<int64_t> keep_tokens() const { return keep_tokens_; }
  ort::ElementType element_type() const;
  ort::ElementType cache_type() const { return cache_type_; }
  std::size_t cache_bytes_per_token() const;
  // Inputs of the KV cache, key and value of layer 0, 1, ...
  const std::vector<std::string>& past_names() const { return past_names_; }

 private:
  void Create(const Options& options);
  void RegisterLibrary(const Options& options, ort::SessionOptions* made);
  void AppendCuda(ort::SessionOptions* made);
  void CheckSignature();
  std::vector<std::string> InputNames() const;
  std::vector<std::string> OutputNames() const;
  std::vector<std::string> OptionalInputNames() const;
  ort::ElementType InputType(std::size_t index) const;

  const OrtRuntime& runtime_;
  BundlePaths paths_;
  Manifest manifest_;
  std::unique_ptr<Gpu> gpu_;
  OwnedMemoryInfo gpu_memory_;
  OwnedSession session_;
  const char* operators_ = "standard";
  std::optional<int64_t> keep_tokens_;
  ort::ElementType cache_type_ = ort::ElementType::kFloat32;
  std::vector<std::string> past_names_;
};

class BoundRun;

// Keys and values of one conversation, in buffers that the graph writes into.
class KvCache {
 public:
  KvCache(const Session& session, int64_t capacity);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  int64_t tokens() const { return tokens_; }      // those that pruning kept
  int64_t position() const { return position_; }  // of the next token
  std::size_t used_bytes() const;
  std::size_t allocated_bytes() const;

  // What a run returns.
  struct Step {
    const void* logits;         // [vocabulary] in the model's type; valid until the next run
    std::vector<int64_t> kept;  // which of the given tokens pruning kept
  };

  // Runs the graph on the tokens right behind the cache, which is given them.
  Step Run(const std::vector<int64_t>& token_ids, const PixelBatch& pixels);

 private:
  friend class BoundRun;
  void Require(int64_t tokens) const;
  void Reserve(int64_t tokens);
  void Allocate(int64_t capacity);

  const Session& session_;
  int64_t capacity_ = 0;
  int64_t tokens_ = 0;
  int64_t position_ = 0;
  using Memory = std::unique_ptr<void, std::function<void(void*)>>;
  Memory NewMemory(std::size_t bytes, int64_t capacity) const;
  void CopyTokens(char* to, int64_t capacity, const char* from) const;

  std::vector<Memory> memory_;
  std::vector<char*> buffers_;  // aligned, in memory_; on the GPU if the session says so
  std::vector<OwnedValue> tensors_;
  std::unique_ptr<BoundRun> single_;  // of the next single token, while the buffers stay
  std::unique_ptr<BoundRun> last_;
};

// Positions of tokens from `start` on, [axes, tokens] with one axis, or three with a grid, and the
// one behind them; as bivlm_edge/positions.py counts them.
struct Positions {
  std::vector<int64_t> values;
  int64_t next = 0;
};
Positions PositionRows(const std::vector<int64_t>& token_ids, int64_t start,
                       const Manifest& manifest);

// The most likely token of logits in the model's type; the lowest id if several are.
// Throws InputError if it is not finite.
int64_t Greedy(const Session& session, const void* logits);

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_SESSION_H_
