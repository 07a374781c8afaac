// Times the kernels of GroupMatMul beside a plain read of the same weights; --help says how.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "bivlm/group_matmul.h"
#include "thread_pool.h"
#include "weight_memory.h"

namespace bivlm::bench {
namespace {

constexpr char kHelp[] =
    R"(usage: group_matmul_bench [option value]...

Medians of GroupMatMul with float32 activations. Kernels (but for generic) and a plain read take
turns, each with the next weight of a mapped file, so that none is in a cache.

  --n N          output features, default 49280 (the head of SmolVLM-256M)
  --k K          input features, default 576
  --bits B       4 or 8, default 8
  --block S      columns per scale, default 64
  --m M          tokens, default 1
  --threads T    default 1
  --rounds R     default 15
  --mb M         of weights, default 720
  --dir DIR      of the file, default /tmp

GB/s: bytes of codes and scales.
)";

struct Options {
  std::size_t n = 49280, k = 576, bits = 8, block = 64, m = 1, threads = 1, rounds = 15, mb = 720;
  std::string directory = "/tmp";
};

Options Parse(int count, char** texts) {
  Options options;
  for (int i = 1; i < count; i += 2) {
    const std::string name = texts[i];
    if (i + 1 == count) throw std::invalid_argument(name + " lacks its value");
    if (name == "--dir") {
      options.directory = texts[i + 1];
      continue;
    }
    std::size_t* value = name == "--n"         ? &options.n
                         : name == "--k"       ? &options.k
                         : name == "--bits"    ? &options.bits
                         : name == "--block"   ? &options.block
                         : name == "--m"       ? &options.m
                         : name == "--threads" ? &options.threads
                         : name == "--rounds"  ? &options.rounds
                         : name == "--mb"      ? &options.mb
                                               : nullptr;
    if (value == nullptr) throw std::invalid_argument("there is no option " + name);
    const long long number = std::atoll(texts[i + 1]);
    if (number < 1 || number > 1000000) {
      throw std::invalid_argument(name + " " + texts[i + 1] + " is not a number from 1 to 1000000");
    }
    *value = static_cast<std::size_t>(number);
  }
  return options;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void Bench(const Options& options) {
  const auto size = [](std::size_t value) { return static_cast<int64_t>(value); };
  GroupMatMulWeight weight;
  const std::string problem = MakeGroupMatMulWeight(
      size(options.k), size(options.n), size(options.bits), size(options.block), &weight);
  if (!problem.empty()) throw std::invalid_argument(problem);
  const std::size_t code_bytes = weight.n * weight.row_bytes();
  const std::size_t bytes = code_bytes + 2 * weight.n * weight.blocks();
  const WeightMemory memory(std::max(options.mb << 20, 2 * bytes), false, options.directory);
  const std::size_t weights = memory.bytes() / bytes;
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0F, 1.0F);
  std::vector<float> x(options.m * options.k);
  for (float& value : x) value = normal(random);
  std::vector<float> y(options.m * options.n);
  ThreadPool pool(options.threads);

  const auto multiply = [&](const GroupMatMulKernel& kernel, const uint8_t* at) {
    weight.codes = at;
    weight.scales = at + code_bytes;
    GroupMatMulArgs args;
    args.weight = &weight;
    args.m = options.m;
    args.x = x.data();
    args.y = y.data();
    RunGroupMatMul(kernel, args, pool.executor());
  };
  volatile uint64_t sink = 0;
  const auto read = [&](const uint8_t* at) {
    const std::size_t parts = options.threads;
    pool.executor().For(parts, [&](std::size_t part) {
      const std::size_t begin = bytes * part / parts;
      const uint64_t found = ReadAll(at + begin, bytes * (part + 1) / parts - begin);
      if (found == 1) sink = found;
    });
  };

  struct Contender {
    std::string name;
    std::function<void(const uint8_t*)> run;
    std::vector<double> us;
  };
  std::vector<Contender> contenders = {{"plain read", read, {}}};
  for (const GroupMatMulKernel& kernel : GroupMatMulKernels()) {
    const bool runs = (kernel.isa & SupportedIsa()) == kernel.isa;
    if (!runs || kernel.isa == isa::kNone) continue;
    contenders.push_back({kernel.name, [&](const uint8_t* at) { multiply(kernel, at); }, {}});
  }
  std::size_t next = 0;
  for (std::size_t round = 0; round < options.rounds; ++round) {
    for (Contender& contender : contenders) {
      const uint8_t* at = memory.data() + next++ % weights * bytes;
      const auto begin = std::chrono::steady_clock::now();
      contender.run(at);
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      contender.us.push_back(seconds.count() * 1e6);
    }
  }
  for (const Contender& contender : contenders) {
    const double us = Median(contender.us);
    std::printf("%-12s %10.1f us  %6.1f GB/s\n", contender.name.c_str(), us,
                static_cast<double>(bytes) / us / 1e3);
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
    std::fprintf(stderr, "group_matmul_bench: %s\n", error.what());
    return 2;
  }
  return 0;
}
