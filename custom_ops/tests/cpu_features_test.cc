// The features that we find against those that Linux reports.
#include "bivlm/cpu_features.h"

#include <fstream>
#include <set>
#include <sstream>
#include <string>

#include "check.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bivlm::testing {
namespace {

std::set<std::string> FlagsOfLinux() {
#if !defined(__x86_64__)
  return {};  // an emulator may show the flags of its host
#endif
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    std::set<std::string> flags;
    for (std::string word; words >> word;) flags.insert(word);
    return flags;
  }
  return {};
}

bool HasAll(const std::set<std::string>& flags, std::initializer_list<const char*> wanted) {
  for (const char* flag : wanted) {
    if (flags.count(flag) == 0) return false;
  }
  return true;
}

// A container may refuse what the CPU has.
bool TilesAreGranted() {
#if defined(__x86_64__) && defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
  return false;
#endif
}

}  // namespace
}  // namespace bivlm::testing

int main() {
  using namespace bivlm;           // NOLINT(google-build-using-namespace)
  using namespace bivlm::testing;  // NOLINT(google-build-using-namespace)
  const std::set<std::string> flags = FlagsOfLinux();
  if (flags.empty()) {
    std::printf("skipped: /proc/cpuinfo has no line 'flags' (not Linux on x86)\n");
    return kSkipped;
  }
  Checker check;
  const bool avx2 = HasAll(flags, {"avx2", "fma", "f16c"});
  const bool avx512 = HasAll(flags, {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"});
  check.Expect(((SupportedIsa() & isa::kAvx2) != 0) == avx2, "avx2: /proc/cpuinfo says ", avx2);
  const bool avxvnni = avx2 && HasAll(flags, {"avx_vnni"});
  check.Expect(((SupportedIsa() & isa::kAvxVnni) != 0) == avxvnni, "avxvnni: /proc/cpuinfo says ",
               avxvnni);
  check.Expect(((SupportedIsa() & isa::kAvx512) != 0) == avx512, "avx512: /proc/cpuinfo says ",
               avx512);
  const bool vbmi = avx512 && HasAll(flags, {"avx512vbmi", "gfni"});
  check.Expect(((SupportedIsa() & isa::kVbmiGfni) != 0) == vbmi,
               "VBMI and GFNI: /proc/cpuinfo says ", vbmi);
  const bool amx = avx512 && HasAll(flags, {"amx_tile", "amx_int8"}) && TilesAreGranted();
  check.Expect(((SupportedIsa() & isa::kAmxInt8) != 0) == amx,
               "amx: /proc/cpuinfo and arch_prctl say ", amx);
  return check.Finish("cpu_features_test");
}
