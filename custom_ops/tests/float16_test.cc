// The portable conversions of half precision: all halves, and the edges between them.
#include "bivlm/float16.h"

#include <cmath>
#include <random>

#include "check.h"
#include "reference.h"

namespace bivlm::testing {
namespace {

void EveryHalf(Checker* check) {
  for (uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const double want = HalfValue(half);
    const float got = FloatFromHalf(half);
    if (std::isnan(want)) {
      check->Expect(std::isnan(got) && std::isnan(FloatFromHalf(HalfFromFloat(got))), "NaN ", bits);
      continue;
    }
    check->Expect(double{got} == want && std::signbit(got) == (bits >= 0x8000), "value of half ",
                  bits, ": got ", got, " want ", want);
    check->Expect(HalfFromFloat(got) == half, "half ", bits, " and back: ", HalfFromFloat(got));
  }
}

void ExpectRounded(Checker* check, float value) {
  const uint16_t got = HalfFromFloat(value);
  // NearestHalf knows finite halves only; from 65520 on the nearest is infinity.
  const uint16_t magnitude = std::fabs(value) >= 65520.0F
                                 ? uint16_t{0x7C00}
                                 : static_cast<uint16_t>(NearestHalf(value) & 0x7FFF);
  const uint16_t want = static_cast<uint16_t>(magnitude | (std::signbit(value) ? 0x8000 : 0));
  check->Expect(got == want, "half of ", value, ": got ", got, " want ", want);
}

// The middle between neighbouring halves, and the floats next to it.
void EveryTie(Checker* check) {
  for (uint32_t bits = 0; bits < 0x7C00; ++bits) {
    const double low = HalfValue(static_cast<uint16_t>(bits));
    const double high = bits == 0x7BFF ? 65536.0 : HalfValue(static_cast<uint16_t>(bits + 1));
    const float middle = static_cast<float>((low + high) / 2);
    for (const float value : {middle, std::nextafter(middle, 0.0F), std::nextafter(middle, 1e9F)}) {
      ExpectRounded(check, value);
      ExpectRounded(check, -value);
    }
  }
}

void RandomFloats(Checker* check) {
  std::mt19937 random(7);
  for (int i = 0; i < 200000; ++i) {
    const float value = FloatFromBits(static_cast<uint32_t>(random()));
    if (std::isfinite(value)) ExpectRounded(check, value);
  }
  check->Expect(HalfFromFloat(INFINITY) == 0x7C00 && HalfFromFloat(-INFINITY) == 0xFC00,
                "infinities");
}

}  // namespace
}  // namespace bivlm::testing

int main() {
  bivlm::testing::Checker check;
  bivlm::testing::EveryHalf(&check);
  bivlm::testing::EveryTie(&check);
  bivlm::testing::RandomFloats(&check);
  return check.Finish("float16_test");
}
