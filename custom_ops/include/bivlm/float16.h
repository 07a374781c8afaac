// IEEE half precision as 16 bits, for code that may not assume F16C.
//
// Functions are static, so that every object file has its own copy: the linker must not replace a
// copy for every CPU by one that was compiled for AVX-512.
#ifndef BIVLM_FLOAT16_H_
#define BIVLM_FLOAT16_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace bivlm {

// What the elements of an activation tensor are.
enum class ElementType : uint8_t { kFloat32, kFloat16 };

static constexpr std::size_t ElementBytes(ElementType type) {
  return type == ElementType::kFloat32 ? sizeof(float) : sizeof(uint16_t);
}

static inline float FloatFromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline uint32_t BitsFromFloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// The float with the value of `half`, exactly.
static inline float FloatFromHalf(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
  const uint32_t magnitude = half & 0x7fffU;
  if (magnitude >= 0x7c00U) return FloatFromBits(sign | 0x7f800000U | (magnitude & 0x3ffU) << 13);
  const uint32_t bits = magnitude >= 0x400U
                            ? (magnitude << 13) + (112U << 23)  // exponent bias 15 -> 127
                            : BitsFromFloat(static_cast<float>(magnitude) * 0x1p-24F);
  return FloatFromBits(sign | bits);
}

// `value` rounded to the nearest half, ties to even; infinity where it is too large.
static inline uint16_t HalfFromFloat(float value) {
  const uint32_t bits = BitsFromFloat(value);
  const uint32_t sign = bits >> 16 & 0x8000U;
  const uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) return static_cast<uint16_t>(sign | 0x7e00U);
  if (magnitude >= 0x477ff000U) return static_cast<uint16_t>(sign | 0x7c00U);  // >= 65520
  if (magnitude < 0x38800000U) {
    // Below 2^-14 the spacing of halves is 2^-24: adding 0.5, whose own spacing is 2^-24, rounds.
    const float shifted = FloatFromBits(magnitude) + 0.5F;
    return static_cast<uint16_t>(sign | (BitsFromFloat(shifted) - 0x3f000000U));
  }
  const uint32_t odd = magnitude >> 13 & 1U;
  return static_cast<uint16_t>(sign | ((magnitude + 0xfffU + odd - 0x38000000U) >> 13));
}

// A half at any address.
static inline float LoadHalf(const void* address) {
  uint16_t half;
  std::memcpy(&half, address, sizeof(half));
  return FloatFromHalf(half);
}

}  // namespace bivlm

#endif  // BIVLM_FLOAT16_H_
