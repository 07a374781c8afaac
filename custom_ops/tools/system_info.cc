#include "system_info.h"

#include <dirent.h>
#include <sched.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <ctime>
#include <set>
#include <sstream>
#include <thread>

#include "files.h"

namespace bivlm::device {
namespace {

constexpr const char* kCpuFlags[] = {"avx2",       "avx512f",  "avx512bw", "avx512_vnni",
                                     "avx512vbmi", "avx_vnni", "gfni",     "amx_int8",
                                     "asimd",      "asimddp",  "i8mm",     "sve2"};
constexpr char kNvmap[] = "/sys/kernel/debug/nvmap/iovmm/clients";

std::string Trimmed(const std::string& text) {
  const std::string space(" \t\r\n\0", 5);  // files of a device tree end with 0
  const std::size_t first = text.find_first_not_of(space);
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(space) - first + 1);
}

// Lines "name: value"; of several with one name the first.
std::map<std::string, std::string> Fields(const std::string& text) {
  std::map<std::string, std::string> fields;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    fields.emplace(Trimmed(line.substr(0, colon)), Trimmed(line.substr(colon + 1)));
  }
  return fields;
}

std::vector<std::string> FolderEntries(const std::string& folder) {
  std::vector<std::string> names;
  DIR* const opened = opendir(folder.c_str());
  if (opened == nullptr) return names;
  while (const dirent* entry = readdir(opened)) {  // NOLINT(concurrency-mt-unsafe)
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  closedir(opened);
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<int> AllowedCores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cores;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cores;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &set)) cores.push_back(core);
  }
  return cores;
}

int PhysicalCores(const std::vector<int>& cores) {
  std::set<std::string> siblings;
  for (const int core : cores) {
    const std::string text = ReadIfThere("/sys/devices/system/cpu/cpu" + std::to_string(core) +
                                         "/topology/thread_siblings_list");
    if (text.empty()) return static_cast<int>(cores.size());
    siblings.insert(text);
  }
  return static_cast<int>(siblings.size());
}

// "1234 kB" in bytes.
std::optional<int64_t> Kilobytes(const std::map<std::string, std::string>& fields,
                                 const char* name) {
  const auto found = fields.find(name);
  if (found == fields.end()) return std::nullopt;
  return std::strtoll(found->second.c_str(), nullptr, 10) * 1024;
}

// "1234K" in bytes, as nvmap writes sizes.
int64_t NvmapBytes(const std::string& text) {
  char* end = nullptr;
  const int64_t value = std::strtoll(text.c_str(), &end, 10);
  if (*end == 'K') return value << 10;
  if (*end == 'M') return value << 20;
  return value;
}

}  // namespace

std::string SystemRoot() {
  const char* root = std::getenv("BIVLM_SYSTEM_ROOT");  // NOLINT(concurrency-mt-unsafe)
  return root == nullptr ? "" : root;
}

std::map<std::string, int64_t> ProcessMemory() {
  std::map<std::string, int64_t> found;
  const auto status = Fields(ReadIfThere("/proc/self/status"));
  const auto rollup = Fields(ReadIfThere("/proc/self/smaps_rollup"));
  const auto take = [&found](const auto& fields, const char* name, const char* key) {
    if (const std::optional<int64_t> bytes = Kilobytes(fields, name)) found[key] = *bytes;
  };
  take(status, "VmHWM", "vm_hwm");
  take(status, "RssAnon", "rss_anon");
  take(status, "RssFile", "rss_file");
  take(rollup, "Pss", "pss");
  return found;
}

Machine MachineInfo() {
  Machine machine;
  utsname names{};
  uname(&names);
  machine.architecture = names.machine;
  machine.system = std::string(names.sysname) + " " + names.release;
  auto fields = Fields(ReadIfThere("/proc/cpuinfo"));
  machine.cpu = fields["model name"].empty() ? machine.architecture : fields["model name"];
  std::set<std::string> flags;
  std::istringstream words(fields["flags"] + " " + fields["Features"]);
  for (std::string word; words >> word;) flags.insert(word);
  for (const char* flag : kCpuFlags) {
    if (flags.count(flag) > 0) machine.cpu_flags.emplace_back(flag);
  }
  const std::vector<int> cores = AllowedCores();
  machine.cores = static_cast<int>(cores.size());
  machine.physical_cores = PhysicalCores(cores);
  machine.memory_bytes = int64_t{sysconf(_SC_PAGE_SIZE)} * sysconf(_SC_PHYS_PAGES);
  return machine;
}

std::string BoardName(const std::string& root) {
  return Trimmed(ReadIfThere(root + "/proc/device-tree/model"));
}

std::vector<PowerRail> PowerRails(const std::string& root) {
  std::vector<PowerRail> rails;
  const std::string base = root + "/sys/class/hwmon/";
  for (const std::string& name : FolderEntries(base)) {
    const std::string folder = base + name;
    if (Trimmed(ReadIfThere(folder + "/name")) != "ina3221") continue;
    for (int channel = 1; channel <= 3; ++channel) {
      const std::string number = std::to_string(channel);
      const std::string label = Trimmed(ReadIfThere(folder + "/in" + number + "_label"));
      const PowerRail rail = {label, folder + "/in" + number + "_input",
                              folder + "/curr" + number + "_input"};
      if (!label.empty() && Milliwatts(rail).has_value()) rails.push_back(rail);
    }
  }
  return rails;
}

std::optional<double> Milliwatts(const PowerRail& rail) {
  const std::string volts = Trimmed(ReadIfThere(rail.voltage_file));
  const std::string amperes = Trimmed(ReadIfThere(rail.current_file));
  if (volts.empty() || amperes.empty()) return std::nullopt;
  return std::strtod(volts.c_str(), nullptr) * std::strtod(amperes.c_str(), nullptr) / 1000.0;
}

bool HasUnifiedMemory(const std::string& root) {
  return !FolderEntries(root + "/sys/kernel/debug/nvmap").empty() ||
         BoardName(root).find("Jetson") != std::string::npos;
}

UnifiedMemory ReadUnifiedMemory(const std::string& root, int process) {
  UnifiedMemory memory;
  const auto fields = Fields(ReadIfThere(root + "/proc/meminfo"));
  memory.total = Kilobytes(fields, "MemTotal");
  memory.available = Kilobytes(fields, "MemAvailable");
  // Lines "user PROCESS PID SIZE", at the end "total SIZE".
  std::istringstream lines(ReadIfThere(root + kNvmap));
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::vector<std::string> columns;
    for (std::string word; words >> word;) columns.push_back(word);
    if (columns.size() == 2 && columns[0] == "total") {
      memory.nvmap = NvmapBytes(columns[1]);
      if (!memory.nvmap_own.has_value()) memory.nvmap_own = 0;
    } else if (columns.size() >= 4 && columns[columns.size() - 2] == std::to_string(process)) {
      memory.nvmap_own = memory.nvmap_own.value_or(0) + NvmapBytes(columns.back());
    }
  }
  return memory;
}

double ProcessorSeconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

void WaitUntilIdle() {
  using Clock = std::chrono::steady_clock;
  constexpr double kSpinningShare = 0.2;
  const auto deadline = Clock::now() + std::chrono::seconds(1);
  while (Clock::now() < deadline) {
    const auto start = Clock::now();
    const double busy = ProcessorSeconds();
    std::this_thread::sleep_for(std::chrono::milliseconds(4));
    const double waited = std::chrono::duration<double>(Clock::now() - start).count();
    if (ProcessorSeconds() - busy < kSpinningShare * waited) return;
  }
}

}  // namespace bivlm::device
