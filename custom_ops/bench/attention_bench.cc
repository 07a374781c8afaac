// Times the kernels of GroupQueryAttention beside a plain read of the same KV cache; --help says
// how.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "bivlm/attention.h"
#include "thread_pool.h"
#include "weight_memory.h"

namespace bivlm::bench {
namespace {

constexpr char kHelp[] =
    R"(usage: attention_bench [option value]...

Medians of GroupQueryAttention with float32 activations in place. Kernels and a plain read of the cache take turns,
each going through all layers, so that the caches of all layers compete for the CPU's.

  --heads H      query heads, default 9
  --kv-heads G   default 3
  --width D      features of a head, default 64
  --past P       tokens in the cache, default 512
  --new S        tokens of the run, default 1
  --layers L     default 30
  --threads T    default 1
  --cache-bits B 16 or 32 (float16, float32), default 16
  --rounds R     default 15

us: per layer. GFLOP/s: 4 D operations for every query and key that it sees.
)";

struct Options {
  std::size_t heads = 9, kv_heads = 3, width = 64, past = 512, tokens = 1, layers = 30, threads = 1,
              cache_bits = 16, rounds = 15;
};

Options Parse(int count, char** texts) {
  Options options;
  for (int i = 1; i < count; i += 2) {
    const std::string name = texts[i];
    std::size_t* value = name == "--heads"        ? &options.heads
                         : name == "--kv-heads"   ? &options.kv_heads
                         : name == "--width"      ? &options.width
                         : name == "--past"       ? &options.past
                         : name == "--new"        ? &options.tokens
                         : name == "--layers"     ? &options.layers
                         : name == "--threads"    ? &options.threads
                         : name == "--cache-bits" ? &options.cache_bits
                         : name == "--rounds"     ? &options.rounds
                                                  : nullptr;
    if (value == nullptr) throw std::invalid_argument("there is no option " + name);
    if (i + 1 == count) throw std::invalid_argument(name + " lacks its value");
    const long long number = std::atoll(texts[i + 1]);
    if (number < (value == &options.past ? 0 : 1) || number > 1000000) {
      throw std::invalid_argument(name + " " + texts[i + 1] + " is not a number from 1 to 1000000");
    }
    *value = static_cast<std::size_t>(number);
  }
  if (options.heads % options.kv_heads != 0) {
    throw std::invalid_argument("--heads is no multiple of --kv-heads");
  }
  if (options.cache_bits != 16 && options.cache_bits != 32) {
    throw std::invalid_argument("--cache-bits is neither 16 nor 32");
  }
  if (options.width % 2 != 0) throw std::invalid_argument("--width is odd");
  return options;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void Bench(const Options& options) {
  const std::size_t total = options.past + options.tokens;
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0F, 1.0F);
  const auto draw = [&](std::size_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = normal(random);
    return values;
  };
  const ElementType cache_type =
      options.cache_bits == 16 ? ElementType::kFloat16 : ElementType::kFloat32;
  const std::size_t cache_elements = options.kv_heads * total * options.width;
  std::vector<std::vector<uint8_t>> caches;  // key, value, key, value, ...
  for (std::size_t i = 0; i < 2 * options.layers; ++i) {
    std::vector<uint8_t>& cache = caches.emplace_back(cache_elements * ElementBytes(cache_type));
    const std::vector<float> values = draw(cache_elements);
    if (cache_type == ElementType::kFloat32) {
      std::memcpy(cache.data(), values.data(), cache.size());
      continue;
    }
    for (std::size_t e = 0; e < cache_elements; ++e) {
      const uint16_t half = HalfFromFloat(values[e]);
      std::memcpy(&cache[2 * e], &half, 2);
    }
  }
  const std::vector<float> states =
      draw(options.tokens * (options.heads + 2 * options.kv_heads) * options.width);
  const std::vector<float> angles(options.tokens * options.width / 2, 0.7F);
  std::vector<float> output(options.tokens * options.heads * options.width);
  const int32_t last = static_cast<int32_t>(total - 1);
  ThreadPool pool(options.threads);

  const auto attend = [&](const AttentionKernel& kernel) {
    for (std::size_t layer = 0; layer < options.layers; ++layer) {
      AttentionArgs args;
      args.cache_type = cache_type;
      args.b = 1;
      args.s = options.tokens;
      args.heads = options.heads;
      args.kv_heads = options.kv_heads;
      args.d = options.width;
      args.past_capacity = args.capacity = total;
      args.scale = 0.125F;
      args.last_index = &last;
      args.qkv = states.data();
      args.cos = args.sin = angles.data();
      args.past_key = args.present_key = caches[2 * layer].data();
      args.past_value = args.present_value = caches[2 * layer + 1].data();
      args.output = output.data();
      RunAttention(kernel, args, pool.executor());
    }
  };
  volatile uint64_t sink = 0;
  const auto read = [&] {
    for (const std::vector<uint8_t>& cache : caches) {
      sink = sink ^ ReadAll(cache.data(), cache.size());
    }
  };

  struct Contender {
    std::string name;
    std::function<void()> run;
    std::vector<double> us;
  };
  std::vector<Contender> contenders = {{"plain read, 1 thread", read, {}}};
  for (const AttentionKernel& kernel : AttentionKernels()) {
    if ((kernel.isa & SupportedIsa()) != kernel.isa) continue;
    contenders.push_back({kernel.name, [&] { attend(kernel); }, {}});
  }
  for (std::size_t round = 0; round < options.rounds; ++round) {
    for (Contender& contender : contenders) {
      const auto begin = std::chrono::steady_clock::now();
      contender.run();
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      contender.us.push_back(seconds.count() / static_cast<double>(options.layers) * 1e6);
    }
  }
  const double pairs =
      static_cast<double>(options.tokens) *
      (static_cast<double>(options.past) + (static_cast<double>(options.tokens) + 1) / 2);
  const double operations = 4 * pairs * static_cast<double>(options.heads * options.width);
  for (const Contender& contender : contenders) {
    const double us = Median(contender.us);
    std::printf("%-20s %10.1f us", contender.name.c_str(), us);
    if (contender.name != contenders[0].name) std::printf("  %6.1f GFLOP/s", operations / us / 1e3);
    std::printf("\n");
  }
}

}  // namespace
}  // namespace bivlm::bench

int main(int count, char** texts) {
  if (count > 1 && std::string(texts[1]) == "--help") {
    std::fputs(bivlm::bench::kHelp, stdout);
    return 0;
  }
  try {
    bivlm::bench::Bench(bivlm::bench::Parse(count, texts));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "attention_bench: %s\n", error.what());
    return 2;
  }
  return 0;
}
