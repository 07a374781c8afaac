// The features that we find against those that Linux reports. With an argument, the name of the
// best kernel of a CPU that an emulator claims to be: whether it is chosen.
#include "bivlm/cpu_features.h"

#include <fstream>
#include <set>
#include <sstream>
#include <string>

#include "bivlm/attention.h"
#include "bivlm/binary_matmul.h"
#include "bivlm/gated_silu.h"
#include "bivlm/group_matmul.h"
#include "bivlm/token_prune.h"
#include "check.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bivlm::testing {
namespace {

// Under qemu 7 the file has the flags of an x86 host, by their name on x86.
#if defined(__x86_64__)
constexpr char kFlags[] = "flags";
#else
constexpr char kFlags[] = "Features";
#endif

std::set<std::string> FlagsOfLinux() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(kFlags, 0) != 0) continue;
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

#if defined(__x86_64__)
// A container may refuse what the CPU has.
bool TilesAreGranted() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
  return false;
#endif
}

// 0 where Linux does not say.
std::size_t L1DataBytesOfLinux() {
  for (const char* index : {"index0", "index1"}) {
    const std::string folder = std::string("/sys/devices/system/cpu/cpu0/cache/") + index;
    std::string type;
    std::size_t level = 0;
    std::size_t kib = 0;
    std::ifstream(folder + "/type") >> type;
    std::ifstream(folder + "/level") >> level;
    std::ifstream(folder + "/size") >> kib;
    if (type == "Data" && level == 1) return kib << 10;
  }
  return 0;
}

void ExpectFlags(Checker* check, const std::set<std::string>& flags) {
  if (const std::size_t want = L1DataBytesOfLinux(); want != 0) {
    check->Expect(L1DataBytes() == want, "L1: got ", L1DataBytes(), ", Linux says ", want);
  }
  const bool avx2 = HasAll(flags, {"avx2", "fma", "f16c"});
  const bool avx512 = HasAll(flags, {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"});
  check->Expect(((SupportedIsa() & isa::kAvx2) != 0) == avx2, "avx2: /proc/cpuinfo says ", avx2);
  const bool avxvnni = avx2 && HasAll(flags, {"avx_vnni"});
  check->Expect(((SupportedIsa() & isa::kAvxVnni) != 0) == avxvnni, "avxvnni: /proc/cpuinfo says ",
                avxvnni);
  check->Expect(((SupportedIsa() & isa::kAvx512) != 0) == avx512, "avx512: /proc/cpuinfo says ",
                avx512);
  const bool vbmi = avx512 && HasAll(flags, {"avx512vbmi", "gfni"});
  check->Expect(((SupportedIsa() & isa::kVbmiGfni) != 0) == vbmi,
                "VBMI and GFNI: /proc/cpuinfo says ", vbmi);
  const bool amx = avx512 && HasAll(flags, {"amx_tile", "amx_int8"}) && TilesAreGranted();
  check->Expect(((SupportedIsa() & isa::kAmxInt8) != 0) == amx,
                "amx: /proc/cpuinfo and arch_prctl say ", amx);
}

#else
void ExpectFlags(Checker* check, const std::set<std::string>& flags) {
  const IsaSet found = SupportedIsa();
  check->Expect(((found & isa::kNeon) != 0) == HasAll(flags, {"asimd"}), "neon");
  check->Expect(((found & isa::kDotProd) != 0) == HasAll(flags, {"asimddp"}), "dotprod");
  check->Expect(((found & isa::kI8mm) != 0) == HasAll(flags, {"i8mm"}), "i8mm");
}
#endif

void ExpectBest(Checker* check, const std::string& want) {
  const std::string names[] = {
      SelectBinaryMatMul(SupportedIsa(), "")->name, SelectAttention(SupportedIsa(), "")->name,
      SelectGatedSilu(SupportedIsa(), "")->name, SelectGroupMatMul(SupportedIsa(), "")->name,
      SelectTokenPrune(SupportedIsa(), "")->name};
  for (const std::string& name : names) {
    check->Expect(name == want, "features ", SupportedIsa(), ": got ", name, ", want ", want);
  }
}

}  // namespace
}  // namespace bivlm::testing

int main(int argc, char** argv) {
  using namespace bivlm;           // NOLINT(google-build-using-namespace)
  using namespace bivlm::testing;  // NOLINT(google-build-using-namespace)
  Checker check;
  if (argc > 1) {
    ExpectBest(&check, argv[1]);
    return check.Finish("cpu_features_test");
  }
  const std::set<std::string> flags = FlagsOfLinux();
  if (flags.empty()) {
    std::printf("skipped: /proc/cpuinfo has no line '%s'\n", kFlags);
    return kSkipped;
  }
  ExpectFlags(&check, flags);
  return check.Finish("cpu_features_test");
}
