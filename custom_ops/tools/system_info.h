// What the numbers of a benchmark depend on, and what a device tells about itself.
#ifndef BIVLM_TOOLS_SYSTEM_INFO_H_
#define BIVLM_TOOLS_SYSTEM_INFO_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace bivlm::device {

// Reads below this folder in place of / (for tests): BIVLM_SYSTEM_ROOT, or "".
std::string SystemRoot();

// Memory of this process in bytes; see runtime/process_memory.py. Keys: vm_hwm, rss_anon,
// rss_file, pss; empty where there is no /proc.
std::map<std::string, int64_t> ProcessMemory();

struct Machine {
  std::string cpu;
  std::string architecture;
  std::vector<std::string> cpu_flags;
  int cores = 0;
  int physical_cores = 0;
  int64_t memory_bytes = 0;
  std::string system;
};
Machine MachineInfo();

// Name of the board in the device tree (Jetson and other ARM boards); "" if there is none.
std::string BoardName(const std::string& root);

// A supply rail that an INA3221 measures (Jetson, JetPack 5 and later: hwmon).
struct PowerRail {
  std::string name;          // e.g. "VDD_IN"
  std::string voltage_file;  // millivolts
  std::string current_file;  // milliamperes
};
std::vector<PowerRail> PowerRails(const std::string& root);

// Power of a rail now; none if it cannot be read.
std::optional<double> Milliwatts(const PowerRail& rail);

// Memory that processor and GPU share on a Jetson, in bytes.
struct UnifiedMemory {
  std::optional<int64_t> total;      // MemTotal
  std::optional<int64_t> available;  // MemAvailable
  std::optional<int64_t> nvmap;      // allocated for the GPU by all processes (root only)
  std::optional<int64_t> nvmap_own;  // by this process
};
UnifiedMemory ReadUnifiedMemory(const std::string& root, int process);

// Whether the board exposes what only a Jetson has: the nvmap allocator of its unified memory.
bool HasUnifiedMemory(const std::string& root);

// Seconds of processor time of this process so far.
double ProcessorSeconds();

// Returns when the threads of this process have stopped spinning; see runtime/idle.py.
void WaitUntilIdle();

}  // namespace bivlm::device

#endif  // BIVLM_TOOLS_SYSTEM_INFO_H_
