// Times the selections of TokenPrune; --help says how.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "bivlm/token_prune.h"
#include "thread_pool.h"

namespace bivlm::bench {
namespace {

constexpr char kHelp[] =
    R"(usage: token_prune_bench [option value]...

Medians of TokenPrune on one picture with float32 features: tokens of 40 kinds with noise of 0.7
of their size, and random scores. The kernel is the one that the library would choose.

  --tokens N     default 576
  --features D   default 1024
  --percent P    tokens to keep, default 25
  --threads T    default 1
  --rounds R     default 5
)";

struct Options {
  std::size_t tokens = 576, features = 1024, percent = 25, threads = 1, rounds = 5;
};

Options Parse(int count, char** texts) {
  Options options;
  for (int i = 1; i < count; i += 2) {
    const std::string name = texts[i];
    std::size_t* value = name == "--tokens"     ? &options.tokens
                         : name == "--features" ? &options.features
                         : name == "--percent"  ? &options.percent
                         : name == "--threads"  ? &options.threads
                         : name == "--rounds"   ? &options.rounds
                                                : nullptr;
    if (value == nullptr) throw std::invalid_argument("there is no option " + name);
    if (i + 1 == count) throw std::invalid_argument(name + " lacks its value");
    const long long number = std::atoll(texts[i + 1]);
    const long long largest = value == &options.percent ? 99 : 100000;
    if (number < 1 || number > largest) {
      throw std::invalid_argument(name + " " + texts[i + 1] + " is not a number from 1 to " +
                                  std::to_string(largest));
    }
    *value = static_cast<std::size_t>(number);
  }
  return options;
}

void Bench(const Options& options) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0F, 1.0F);
  constexpr std::size_t kKinds = 40;
  std::vector<float> kinds(kKinds * options.features);
  for (float& value : kinds) value = normal(random);
  std::vector<float> hidden;
  std::vector<float> scores;
  for (std::size_t token = 0; token < options.tokens; ++token) {
    const float* kind = kinds.data() + random() % kKinds * options.features;
    for (std::size_t d = 0; d < options.features; ++d) {
      hidden.push_back(kind[d] + 0.7F * normal(random));
    }
    scores.push_back(static_cast<float>(random()) * 0x1p-32F);
  }
  const auto keep = static_cast<int64_t>((options.tokens * options.percent + 99) / 100);
  TokenPruneArgs args;
  args.b = 1;
  args.s = options.tokens;
  args.hidden = args.metric = hidden.data();
  args.width = args.dim = options.features;
  args.scores = scores.data();
  args.keep.counts = &keep;
  const TokenPruneKernel& kernel = *SelectTokenPrune(SupportedIsa(), "");
  std::vector<float> pruned(static_cast<std::size_t>(keep) * options.features);
  ThreadPool pool(options.threads);
  std::printf("%s, %zu of %zu tokens, %zu features\n", kernel.name, static_cast<std::size_t>(keep),
              options.tokens, options.features);

  struct Contender {
    TokenPruneMode mode;
    FirstToken first;
    MergeKind merge;
    std::vector<double> ms;
  };
  std::vector<Contender> contenders;
  for (std::size_t mode = 0; mode < std::size(kTokenPruneModes); ++mode) {
    const auto choice = static_cast<TokenPruneMode>(mode);
    contenders.push_back({choice, FirstToken::kAuto, MergeKind::kNone, {}});
  }
  contenders.push_back({TokenPruneMode::kMaxmin, FirstToken::kFarthest, MergeKind::kNone, {}});
  contenders.push_back({TokenPruneMode::kTopkScore, FirstToken::kAuto, MergeKind::kMean, {}});
  for (std::size_t round = 0; round < options.rounds; ++round) {
    for (Contender& contender : contenders) {
      args.options.mode = contender.mode;
      args.options.first = contender.first;
      args.options.merge = contender.merge;
      pruned.resize(contender.mode == TokenPruneMode::kNone
                        ? hidden.size()
                        : static_cast<std::size_t>(keep) * options.features);
      const auto begin = std::chrono::steady_clock::now();
      WritePruned(args, RunTokenPrune(kernel, args, pool.executor()), pruned.data(),
                  pool.executor());
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      contender.ms.push_back(seconds.count() * 1e3);
    }
  }
  for (Contender& contender : contenders) {
    std::sort(contender.ms.begin(), contender.ms.end());
    std::string name(kTokenPruneModes[static_cast<std::size_t>(contender.mode)]);
    if (contender.first != FirstToken::kAuto) name += ", first farthest";
    if (contender.merge != MergeKind::kNone) name += ", merge mean";
    std::printf("%-24s %9.2f ms\n", name.c_str(), contender.ms[contender.ms.size() / 2]);
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
    std::fprintf(stderr, "token_prune_bench: %s\n", error.what());
    return 2;
  }
  return 0;
}
