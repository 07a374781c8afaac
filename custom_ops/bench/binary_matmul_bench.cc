// Times the kernels of BinaryMatMul on the shapes of real layers, beside a plain read of the same
// weights; --help says how.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "bivlm/binary_matmul.h"
#include "thread_pool.h"
#include "weight_memory.h"

namespace bivlm::bench {
namespace {

constexpr char kHelp[] =
    R"(usage: binary_matmul_bench [option value]... [--huge] [--json]

Medians (and quartiles) of BinaryMatMul, transform of the activations included. Kernels and a plain
read of the same weight take turns. Lists have commas.

  --shapes NxK,..    output x input features; default: layers from 576 to 8192 (see below)
  --m M,..           tokens; default 1,4,64,256
  --bits B,..        planes per weight, 1 to 4, a fraction for columns of two kinds; default 2
  --kernels NAME,..  default: all that this CPU has, but generic, which is slow
  --threads T,..     default 1
  --memory hot,cold  the same weight again and again, or the next one in --cold-mb; default both
  --cold-mb MB       default 720
  --seconds S        of timing for each kernel and line, 3 samples at least; default 0.3
  --dir FOLDER       where the file of weights is mapped from (it is removed); default /tmp
  --huge             weights in anonymous memory of 2 MiB pages instead of a mapped file
  --json             one JSON line instead of the table

Default shapes: SmolVLM 576x576 576x1536 1536x576 960x2560, LLaVA-OneVision 896x896 896x4864
4864x896, SigLIP 1152x4304, Qwen2.5-VL 2048x2048 11008x2048 3584x3584 3584x18944, 4096x4096
8192x8192.

us: CPU time with one thread, else the clock on the wall. GB/s: bytes of the weight (codes and
coefficients) per second; read: those of the plain read; GFLOP/s: 2 N K M operations.
)";

struct Shape {
  std::size_t n = 0;
  std::size_t k = 0;
};

struct Options {
  std::vector<Shape> shapes = {{576, 576},   {576, 1536},   {1536, 576},  {896, 896},
                               {896, 4864},  {4864, 896},   {960, 2560},  {1152, 4304},
                               {2048, 2048}, {11008, 2048}, {3584, 3584}, {3584, 18944},
                               {4096, 4096}, {8192, 8192}};
  std::vector<std::size_t> m = {1, 4, 64, 256};
  std::vector<double> bits = {2.0};
  std::vector<const BinaryMatMulKernel*> kernels;
  std::vector<std::size_t> threads = {1};
  bool hot = true;
  bool cold = true;
  std::size_t cold_bytes = std::size_t{720} << 20;
  double seconds = 0.3;
  std::string directory = "/tmp";
  bool huge = false;
  bool json = false;
};

// ---- options ----

[[noreturn]] void Refuse(const std::string& text) { throw std::invalid_argument(text); }

std::vector<std::string> Split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  if (parts.empty()) Refuse("an option has an empty list");
  return parts;
}

double Number(const std::string& text, double least, double most) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(value >= least && value <= most)) {
    std::ostringstream message;
    message << "'" << text << "' is no number from " << least << " to " << most;
    Refuse(message.str());
  }
  return value;
}

std::size_t Count(const std::string& text, std::size_t most) {
  const double value = Number(text, 1.0, static_cast<double>(most));
  if (value != std::floor(value)) Refuse("'" + text + "' is no whole number");
  return static_cast<std::size_t>(value);
}

const BinaryMatMulKernel* KernelNamed(const std::string& name) {
  const BinaryMatMulKernel* kernel =
      name.empty() ? nullptr : SelectBinaryMatMul(SupportedIsa(), name);
  if (kernel == nullptr) {
    Refuse("no kernel '" + name +
           "' here; available: " + AvailableBinaryMatMulNames(SupportedIsa()));
  }
  return kernel;
}

void SetMemory(const std::string& value, Options* options) {
  options->hot = false;
  options->cold = false;
  for (const std::string& part : Split(value)) {
    if (part != "hot" && part != "cold") Refuse("--memory takes hot, cold or both, not " + part);
    (part == "hot" ? options->hot : options->cold) = true;
  }
}

void SetOption(const std::string& name, const std::string& value, Options* options) {
  constexpr std::size_t kMostFeatures = std::size_t{1} << 20;
  if (name == "--shapes") {
    options->shapes.clear();
    for (const std::string& part : Split(value)) {
      const std::size_t x = part.find('x');
      if (x == std::string::npos) Refuse("'" + part + "' is no shape, expected NxK");
      options->shapes.push_back(
          {Count(part.substr(0, x), kMostFeatures), Count(part.substr(x + 1), kMostFeatures)});
    }
  } else if (name == "--m") {
    options->m.clear();
    for (const std::string& part : Split(value)) options->m.push_back(Count(part, 1U << 16));
  } else if (name == "--bits") {
    options->bits.clear();
    for (const std::string& part : Split(value)) options->bits.push_back(Number(part, 1.0, 4.0));
  } else if (name == "--kernels") {
    options->kernels.clear();
    for (const std::string& part : Split(value)) options->kernels.push_back(KernelNamed(part));
  } else if (name == "--threads") {
    options->threads.clear();
    for (const std::string& part : Split(value)) options->threads.push_back(Count(part, 256));
  } else if (name == "--memory") {
    SetMemory(value, options);
  } else if (name == "--cold-mb") {
    options->cold_bytes = Count(value, 1U << 20) << 20;
  } else if (name == "--seconds") {
    options->seconds = Number(value, 0.0, 3600.0);
  } else if (name == "--dir") {
    options->directory = value;
  } else {
    Refuse("unknown option " + name);
  }
}

Options ParseOptions(const std::vector<std::string>& arguments) {
  Options options;
  for (const BinaryMatMulKernel& kernel : BinaryMatMulKernels()) {
    const bool runs = (kernel.isa & SupportedIsa()) == kernel.isa;
    if (runs && (kernel.isa != isa::kNone || SupportedIsa() == isa::kNone)) {
      options.kernels.push_back(&kernel);
    }
  }
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i] == "--huge") {
      options.huge = true;
    } else if (arguments[i] == "--json") {
      options.json = true;
    } else if (i + 1 < arguments.size()) {
      SetOption(arguments[i], arguments[i + 1], &options);
      ++i;
    } else {
      Refuse(arguments[i] + " needs a value, or is unknown");
    }
  }
  return options;
}

// ---- weights ----

// n_0, n_1, .. for `bits` planes per weight in the mean.
std::vector<int64_t> PlaneColumns(std::size_t k, double bits) {
  const std::size_t chunks = (k + kChunkColumns - 1) / kChunkColumns;
  std::vector<int64_t> columns;
  for (double left = bits; left > 1e-9; left -= 1.0) {
    const double share = std::min(left, 1.0) * static_cast<double>(chunks);
    const int64_t count = std::llround(share);
    if (count > 0) columns.push_back(count * static_cast<int64_t>(kChunkColumns));
  }
  return columns;
}

BinaryMatMulWeight MakeWeight(const Shape& shape, double bits) {
  const std::vector<int64_t> columns = PlaneColumns(shape.k, bits);
  BinaryMatMulShape attributes;
  attributes.n = static_cast<int64_t>(shape.n);
  attributes.k = static_cast<int64_t>(shape.k);
  attributes.plane_columns = columns.data();
  attributes.plane_count = columns.size();
  BinaryMatMulWeight weight;
  const std::string problem = MakeBinaryMatMulWeight(attributes, &weight);
  if (!problem.empty()) Refuse(problem);
  return weight;
}

std::size_t CodeBytes(const BinaryMatMulWeight& weight) {
  return weight.panels * weight.panel_code_bytes;
}
std::size_t CoefficientCount(const BinaryMatMulWeight& weight) {
  return weight.panels * weight.coefficient_slots * kPanelRows;
}
// From a weight to the next, in pages as in model.onnx.data.
std::size_t Stride(const BinaryMatMulWeight& weight) {
  return (CodeBytes(weight) + 4095) / 4096 * 4096;
}

// ---- time ----

double Seconds(bool of_this_thread) {
  if (!of_this_thread) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
  timespec now = {};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

struct Quartiles {
  double low = 0.0;
  double median = 0.0;
  double high = 0.0;
};

Quartiles QuartilesOf(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  const auto at = [&samples](std::size_t quarter) {
    return samples[(samples.size() - 1) * quarter / 4];
  };
  return {at(1), at(2), at(3)};
}

// Runs the calls in turns: a sample of one, a sample of the next. A sample takes 100 us at least.
std::vector<Quartiles> TimeInTurns(const std::vector<std::function<void()>>& calls, double seconds,
                                   bool of_this_thread) {
  std::vector<std::size_t> repeats;
  for (const std::function<void()>& call : calls) {
    call();
    const double start = Seconds(of_this_thread);
    call();
    const double once = std::max(1e-9, Seconds(of_this_thread) - start);
    repeats.push_back(1 + static_cast<std::size_t>(1e-4 / once));
  }
  std::vector<std::vector<double>> samples(calls.size());
  std::vector<double> spent(calls.size(), 0.0);
  for (bool more = true; more;) {
    more = false;
    for (std::size_t i = 0; i < calls.size(); ++i) {
      if (spent[i] >= seconds && samples[i].size() >= 3) continue;
      const double start = Seconds(of_this_thread);
      for (std::size_t repeat = 0; repeat < repeats[i]; ++repeat) calls[i]();
      const double taken = Seconds(of_this_thread) - start;
      samples[i].push_back(taken / static_cast<double>(repeats[i]));
      spent[i] += taken;
      more = true;
    }
  }
  std::vector<Quartiles> result;
  for (const std::vector<double>& sample : samples) result.push_back(QuartilesOf(sample));
  return result;
}

// ---- benchmark ----

struct Line {
  Shape shape;
  std::size_t m;
  double bits;
  std::size_t threads;
  bool cold;
  bool huge;
};

void PrintHeader() {
  std::printf("%-11s %4s %5s %7s %-4s %-6s %-8s %10s %-21s %7s %7s %6s %8s\n", "N x K", "m", "bits",
              "threads", "", "pages", "kernel", "us", "[quartiles]", "GB/s", "read", "share",
              "GFLOP/s");
}

void PrintResult(const Line& line, const char* kernel, const Quartiles& time, double gbs,
                 double read_gbs, bool json, bool first) {
  const char* pages = line.huge ? "huge" : "mapped";
  const Shape& shape = line.shape;
  if (json) {
    std::printf(
        "%s{\"k\": %zu, \"n\": %zu, \"m\": %zu, \"threads\": %zu, \"bits\": %.4g, \"cold\": %s, "
        "\"pages\": \"%s\", \"kernel\": \"%s\", \"us\": %.3f, \"us_low\": %.3f, \"us_high\": %.3f, "
        "\"gbs\": %.3f, \"bandwidth_gbs\": %.3f}",
        first ? "" : ", ", shape.k, shape.n, line.m, line.threads, line.bits,
        line.cold ? "true" : "false", pages, kernel, time.median * 1e6, time.low * 1e6,
        time.high * 1e6, gbs, read_gbs);
    return;
  }
  const std::string size = std::to_string(shape.n) + "x" + std::to_string(shape.k);
  char quartiles[48];
  std::snprintf(quartiles, sizeof(quartiles), "[%.1f-%.1f]", time.low * 1e6, time.high * 1e6);
  const double operations = 2.0 * static_cast<double>(shape.n * shape.k * line.m);
  std::printf("%-11s %4zu %5.3g %7zu %-4s %-6s %-8s %10.1f %-21s %7.2f %7.2f %5.0f%% %8.1f\n",
              size.c_str(), line.m, line.bits, line.threads, line.cold ? "cold" : "hot", pages,
              kernel, time.median * 1e6, quartiles, gbs, read_gbs, 100.0 * gbs / read_gbs,
              operations / time.median * 1e-9);
  std::fflush(stdout);
}

// All kernels on one line's problem. Returns how many results were printed before and here.
std::size_t RunLine(const Options& options, const WeightMemory& memory, const Line& line,
                    ThreadPool* pool, std::size_t printed) {
  BinaryMatMulWeight weight = MakeWeight(line.shape, line.bits);
  const std::size_t copies =
      line.cold ? std::max<std::size_t>(1, options.cold_bytes / Stride(weight)) : 1;
  // Each weight has coefficients of its own, around 0.05.
  std::mt19937_64 random(2);
  std::vector<uint16_t> coefficients(copies * CoefficientCount(weight));
  for (uint16_t& value : coefficients) value = static_cast<uint16_t>(0x2A00 + random() % 0x0400);
  std::vector<float> x(line.m * line.shape.k);
  for (float& value : x) value = static_cast<float>(random() % 2001) / 1000.0F - 1.0F;
  std::vector<float> y(line.m * line.shape.n);
  BinaryMatMulArgs args;
  args.weight = &weight;
  args.m = line.m;
  args.x = x.data();
  args.y = y.data();
  const Executor executor = pool->executor();

  std::size_t turn = 0;
  const auto next_weight = [&] {
    const std::size_t copy = turn++ % copies;
    weight.codes = memory.data() + copy * Stride(weight);
    weight.coefficients =
        reinterpret_cast<const uint8_t*>(coefficients.data() + copy * CoefficientCount(weight));
  };
  std::vector<uint64_t> read_sums(line.threads);
  std::vector<std::function<void()>> calls = {[&] {
    next_weight();
    const std::size_t bytes = CodeBytes(weight);
    executor.For(line.threads, [&](std::size_t part) {
      const std::size_t begin = bytes * part / line.threads;
      read_sums[part] ^= ReadAll(weight.codes + begin, bytes * (part + 1) / line.threads - begin);
    });
  }};
  for (const BinaryMatMulKernel* kernel : options.kernels) {
    calls.emplace_back([&, kernel] {
      next_weight();
      RunBinaryMatMul(*kernel, args, executor);
    });
  }
  const std::vector<Quartiles> times = TimeInTurns(calls, options.seconds, line.threads == 1);
  const double code_bytes = static_cast<double>(CodeBytes(weight));
  const double bytes = code_bytes + 2.0 * static_cast<double>(CoefficientCount(weight));
  const double read_gbs = code_bytes / times[0].median * 1e-9;
  for (std::size_t i = 0; i < options.kernels.size(); ++i, ++printed) {
    PrintResult(line, options.kernels[i]->name, times[i + 1], bytes / times[i + 1].median * 1e-9,
                read_gbs, options.json, printed == 0);
  }
  return printed;
}

void RunAll(const Options& options) {
  std::size_t bytes = options.cold ? options.cold_bytes : 0;
  for (const Shape& shape : options.shapes) {
    for (const double bits : options.bits) {
      bytes = std::max(bytes, Stride(MakeWeight(shape, bits)));
    }
  }
  const WeightMemory memory(bytes, options.huge, options.directory);
  if (options.json) {
    std::printf("{\"kernels\": [");
  } else {
    PrintHeader();
  }
  std::size_t printed = 0;
  for (const std::size_t threads : options.threads) {
    ThreadPool pool(threads);
    for (const Shape& shape : options.shapes) {
      for (const std::size_t m : options.m) {
        for (const double bits : options.bits) {
          for (const bool cold : {false, true}) {
            if (!(cold ? options.cold : options.hot)) continue;
            const Line line = {shape, m, bits, threads, cold, options.huge};
            printed = RunLine(options, memory, line, &pool, printed);
          }
        }
      }
    }
  }
  if (options.json) std::printf("]}\n");
}

}  // namespace
}  // namespace bivlm::bench

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (std::count(arguments.begin(), arguments.end(), "--help") > 0) {
    std::fputs(bivlm::bench::kHelp, stdout);
    return 0;
  }
  try {
    bivlm::bench::RunAll(bivlm::bench::ParseOptions(arguments));
  } catch (const std::invalid_argument& problem) {
    std::fprintf(stderr, "binary_matmul_bench: %s; --help lists the options\n", problem.what());
    return 2;
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "binary_matmul_bench: %s\n", problem.what());
    return 1;
  }
  return 0;
}
