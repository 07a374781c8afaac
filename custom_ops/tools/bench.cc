#include "bench.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>
#include <thread>
#include <vector>

#include "error.h"
#include "files.h"
#include "picture.h"
#include "preprocess.h"
#include "prompt.h"
#include "session.h"
#include "system_info.h"

namespace bivlm::device {
namespace {

using Clock = std::chrono::steady_clock;
using Json = nlohmann::ordered_json;

constexpr char kDefaultPrompt[] = "what is shown in the picture?";

double MsSince(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

// To six digits.
double Rounded(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.6g", value);
  return std::strtod(text, nullptr);
}

// Linearly interpolated, as numpy.percentile does.
double Quantile(const std::vector<double>& sorted, double share) {
  const double place = share * static_cast<double>(sorted.size() - 1);
  const auto low = static_cast<std::size_t>(place);
  const std::size_t high = std::min(low + 1, sorted.size() - 1);
  return sorted[low] + (sorted[high] - sorted[low]) * (place - static_cast<double>(low));
}

Json Quartiles(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return {{"median", Rounded(Quantile(values, 0.5))},
          {"q1", Rounded(Quantile(values, 0.25))},
          {"q3", Rounded(Quantile(values, 0.75))}};
}

template <typename T>
Json OrNull(const std::optional<T>& value) {
  return value.has_value() ? Json(*value) : Json(nullptr);
}

// Times of one repeat; see Sample in runtime/bench_worker.py.
struct Sample {
  double ttft_ms;
  double preprocess_ms;
  double first_run_ms;
  double prefill_ms;
  double vision_ms;
  double decode_ms;
};

// Reads the supply rails every 50 ms while it lives.
class PowerSampler {
 public:
  explicit PowerSampler(std::vector<PowerRail> rails) : rails_(std::move(rails)) {
    if (!rails_.empty()) thread_ = std::thread([this] { Sampling(); });
  }
  PowerSampler(const PowerSampler&) = delete;
  PowerSampler& operator=(const PowerSampler&) = delete;
  ~PowerSampler() { Stop(); }

  // Milliwatts by rail; null without rails.
  Json Finish() {
    Stop();
    Json found;
    for (const auto& [name, values] : milliwatts_) found[name] = Quartiles(values);
    return found;
  }

 private:
  void Sampling() {
    do {
      for (const PowerRail& rail : rails_) {
        if (const auto power = Milliwatts(rail)) milliwatts_[rail.name].push_back(*power);
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    } while (!stopped_);
  }

  void Stop() {
    stopped_ = true;
    if (thread_.joinable()) thread_.join();
  }

  std::vector<PowerRail> rails_;
  std::map<std::string, std::vector<double>> milliwatts_;  // the thread's until it has ended
  std::atomic<bool> stopped_{false};
  std::thread thread_;
};

Json UnifiedMemoryNow() {
  if (!HasUnifiedMemory(SystemRoot())) return nullptr;
  const UnifiedMemory memory = ReadUnifiedMemory(SystemRoot(), getpid());
  return {{"total_bytes", OrNull(memory.total)},
          {"available_bytes", OrNull(memory.available)},
          {"nvmap_bytes", OrNull(memory.nvmap)},
          {"nvmap_own_bytes", OrNull(memory.nvmap_own)}};
}

class Worker {
 public:
  Worker(const Session& session, const Arguments& arguments)
      : session_(session), arguments_(arguments) {
    if (!arguments.token_ids.has_value()) {
      prompts_ = std::make_unique<PromptBuilder>(session.paths(), session.manifest());
    }
    const int64_t context = session.manifest().context_length;
    prompt_tokens_ = static_cast<int64_t>(Prepare().ids.size());
    if (prompt_tokens_ + arguments.new_tokens > context) {
      throw RequestError("'" + arguments.model + "' takes " + std::to_string(context) +
                         " tokens; the prompt has " + std::to_string(prompt_tokens_) +
                         " and --new-tokens is " + std::to_string(arguments.new_tokens) +
                         ". Lower one of them.");
    }
    if (arguments.context.has_value()) CheckContext(*arguments.context);
  }

  Sample Measure() {
    const Clock::time_point start = Clock::now();
    const Inputs inputs = Prepare();
    Sample sample{};
    sample.preprocess_ms = MsSince(start);
    const Clock::time_point run_start = Clock::now();
    const auto count = static_cast<int64_t>(inputs.ids.size());
    KvCache cache(session_,
                  std::max(count, arguments_.context.value_or(0)) + arguments_.new_tokens);
    const KvCache::Step step = cache.Run(inputs.ids, inputs.pixels);
    int64_t token = Greedy(session_, step.logits);
    sample.first_run_ms = MsSince(run_start);
    sample.ttft_ms = MsSince(start);
    Fill(&cache);
    const Clock::time_point decode_start = Clock::now();
    for (int64_t i = 1; i < arguments_.new_tokens; ++i) {
      token = Greedy(session_, cache.Run({token}, {}).logits);
    }
    sample.decode_ms = MsSince(decode_start) / static_cast<double>(arguments_.new_tokens - 1);
    kept_tokens_ = static_cast<int64_t>(step.kept.size());
    used_bytes_ = cache.used_bytes();
    allocated_bytes_ = cache.allocated_bytes();
    sample.prefill_ms = sample.first_run_ms;
    if (inputs.pixels.images > 0) {
      const std::vector<int64_t> filler = Filler(kept_tokens_);
      const Clock::time_point prefill_start = Clock::now();
      KvCache other(session_, 0);
      other.Run(filler, {});
      sample.prefill_ms = MsSince(prefill_start);
    }
    sample.vision_ms = sample.first_run_ms - sample.prefill_ms;
    return sample;
  }

  int64_t prompt_tokens() const { return prompt_tokens_; }
  int64_t kept_tokens() const { return kept_tokens_; }
  std::size_t used_bytes() const { return used_bytes_; }
  std::size_t allocated_bytes() const { return allocated_bytes_; }

 private:
  struct Inputs {
    std::vector<int64_t> ids;
    PixelBatch pixels;
  };

  Inputs Prepare() const {
    PreparedPicture picture;
    if (!arguments_.image.empty()) {
      picture = Preprocess(ReadPicture(arguments_.image), session_.manifest());
    }
    std::vector<int64_t> ids =
        prompts_ == nullptr ? ParseTokenIds(*arguments_.token_ids)
                            : prompts_->Encode(arguments_.prompt.value_or(kDefaultPrompt), picture);
    return {std::move(ids), std::move(picture.batch)};
  }

  void CheckContext(int64_t tokens) const {
    const int64_t limit = session_.manifest().context_length;
    if (tokens + arguments_.new_tokens > limit) {
      throw RequestError("'" + arguments_.model + "' takes " + std::to_string(limit) +
                         " tokens; --context is " + std::to_string(*arguments_.context) +
                         " and --new-tokens " + std::to_string(arguments_.new_tokens) +
                         ". Lower one of them.");
    }
  }

  // Puts as much other text behind the prompt as --context asks for.
  void Fill(KvCache* cache) const {
    if (!arguments_.context.has_value() || *arguments_.context == cache->tokens()) return;
    const int64_t more = *arguments_.context - cache->tokens();
    if (more < 0) {
      throw RequestError("--context " + std::to_string(*arguments_.context) + " is less than the " +
                         std::to_string(cache->tokens()) + " tokens of the prompt that '" +
                         arguments_.model + "' keeps. Give at least that.");
    }
    CheckContext(cache->position() + more);
    cache->Run(Filler(more), {});
  }

  // Tokens of text: the placeholder needs pixels, any other costs the decoder the same.
  std::vector<int64_t> Filler(int64_t count) const {
    const int64_t image = session_.manifest().image_token_id;
    return std::vector<int64_t>(static_cast<std::size_t>(count), image != 0 ? image - 1 : 1);
  }

  const Session& session_;
  const Arguments& arguments_;
  std::unique_ptr<PromptBuilder> prompts_;
  int64_t prompt_tokens_ = 0;
  int64_t kept_tokens_ = 0;
  std::size_t used_bytes_ = 0;
  std::size_t allocated_bytes_ = 0;
};

std::string Label(const std::string& model) {
  const std::string name = model.substr(model.find_last_of('/') + 1);
  return name.substr(0, name.find_last_of('.'));
}

Json MachineJson() {
  const Machine machine = MachineInfo();
  return {{"cpu", machine.cpu},
          {"architecture", machine.architecture},
          {"cpu_flags", machine.cpu_flags},
          {"cores", machine.cores},
          {"physical_cores", machine.physical_cores},
          {"memory_bytes", machine.memory_bytes},
          {"system", machine.system},
          {"python", nullptr}};
}

Json DeviceJson(const Json& memory, PowerSampler* power) {
  const std::string board = BoardName(SystemRoot());
  return {{"board", board.empty() ? Json(nullptr) : Json(board)},
          {"unified_memory", memory},
          {"power_mw", power->Finish()}};
}

void CheckArguments(const Arguments& arguments) {
  if (arguments.repeats < 1 || arguments.warmups < 0) {
    throw RequestError("--repeats " + std::to_string(arguments.repeats) + " --warmups " +
                       std::to_string(arguments.warmups) +
                       " cannot be done. Give 1 or more repeats and 0 or more warm-ups.");
  }
  if (arguments.context.has_value() && *arguments.context < 1) {
    throw RequestError("--context must be 1 or more tokens.");
  }
  if (arguments.new_tokens < 2) {
    throw RequestError("--new-tokens must be 2 or more: the first is the prefill's.");
  }
}

void AddTimes(const std::vector<Sample>& samples, int64_t kept_tokens, Json* model) {
  const auto series = [&samples](double Sample::* member) {
    std::vector<double> values;
    for (const Sample& sample : samples) values.push_back(sample.*member);
    return values;
  };
  const std::pair<const char*, double Sample::*> times[] = {
      {"ttft_ms", &Sample::ttft_ms},           {"preprocess_ms", &Sample::preprocess_ms},
      {"first_run_ms", &Sample::first_run_ms}, {"prefill_ms", &Sample::prefill_ms},
      {"vision_ms", &Sample::vision_ms},       {"decode_ms", &Sample::decode_ms}};
  for (const auto& [name, member] : times) (*model)[name] = Quartiles(series(member));
  std::vector<double> prefill = series(&Sample::prefill_ms);
  for (double& value : prefill) value = static_cast<double>(kept_tokens) * 1e3 / value;
  std::vector<double> decode = series(&Sample::decode_ms);
  for (double& value : decode) value = 1e3 / value;
  (*model)["prefill_tokens_per_s"] = Quartiles(prefill);
  (*model)["decode_tokens_per_s"] = Quartiles(decode);
}

}  // namespace

std::string Bench(const OrtRuntime& runtime, const Arguments& arguments) {
  CheckArguments(arguments);
  Json memory = {{"before_load", ProcessMemory()}};
  Json unified = {{"before_load", UnifiedMemoryNow()}};
  const Clock::time_point start = Clock::now();
  const Session session(runtime, BundlePaths{arguments.model},
                        {arguments.library, !arguments.no_custom_ops, arguments.threads,
                         arguments.keep_tokens, arguments.provider == "cuda"});
  const double load_ms = MsSince(start);
  memory["after_load"] = ProcessMemory();
  unified["after_load"] = UnifiedMemoryNow();
  Worker worker(session, arguments);
  std::vector<Sample> samples;
  for (int64_t turn = 0; turn < arguments.warmups; ++turn) {
    worker.Measure();
    WaitUntilIdle();
  }
  PowerSampler power(PowerRails(SystemRoot()));
  for (int64_t turn = 0; turn < arguments.repeats; ++turn) {
    samples.push_back(worker.Measure());
    WaitUntilIdle();
  }
  memory["after_run"] = ProcessMemory();
  unified["after_run"] = UnifiedMemoryNow();
  const bool has_text = !arguments.token_ids.has_value();
  Json model = {
      {"label", Label(arguments.model)},
      {"model", arguments.model},
      {"image", arguments.image.empty() ? Json(nullptr) : Json(arguments.image)},
      {"prompt", has_text ? Json(arguments.prompt.value_or(kDefaultPrompt)) : Json(nullptr)},
      {"new_tokens", arguments.new_tokens},
      {"threads", OrNull(arguments.threads)},
      {"custom_ops", !arguments.no_custom_ops},
      {"context", OrNull(arguments.context)},
      {"keep_tokens", OrNull(arguments.keep_tokens)},
      {"load_ms", load_ms},
      {"prompt_tokens", worker.prompt_tokens()},
      {"weight_bytes", FileSize(session.paths().graph) + FileSize(session.paths().data())},
      {"kv_cache_bytes_per_token", session.cache_bytes_per_token()},
      {"dtype", session.manifest().dtype},
      {"operators", session.operators()},
      {"provider", session.gpu() == nullptr ? "cpu" : "cuda"},
      {"kept_tokens", worker.kept_tokens()},
      {"kv_cache_bytes", worker.used_bytes()},
      {"kv_cache_allocated_bytes", worker.allocated_bytes()},
      {"memory", memory}};
  AddTimes(samples, worker.kept_tokens(), &model);
  const char* kernel = std::getenv("BIVLM_FORCE_KERNEL");  // NOLINT(concurrency-mt-unsafe)
  const Json result = {{"benchmark", "bivlm-device"},
                       {"version", BIVLM_VERSION},
                       {"onnxruntime", runtime.version()},
                       {"machine", MachineJson()},
                       {"kernel", kernel == nullptr || *kernel == '\0' ? "auto" : kernel},
                       {"warmups", arguments.warmups},
                       {"repeats", arguments.repeats},
                       {"models", Json::array({model})},
                       {"ratios", Json::array()},
                       {"device", DeviceJson(unified, &power)}};
  return result.dump();
}

}  // namespace bivlm::device
