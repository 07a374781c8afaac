// Both operators in double, written from export/OPS.md and bivlm_edge/quant/FORMAT.md alone:
// nothing here calls the code under test.
#ifndef BIVLM_TESTS_REFERENCE_H_
#define BIVLM_TESTS_REFERENCE_H_

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <vector>

namespace bivlm::testing {

// Value of a half, from the definition of the format.
inline double HalfValue(uint16_t half) {
  const double sign = (half & 0x8000) != 0 ? -1.0 : 1.0;
  const int exponent = half >> 10 & 31;
  const int mantissa = half & 1023;
  if (exponent == 31) {
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

// Nearest half of a finite value, ties to even, found by search; for test data.
inline uint16_t NearestHalf(double value) {
  uint16_t low = 0;
  uint16_t high = 0x7bff;
  const double magnitude = std::fabs(value);
  while (low < high) {
    const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
    if (HalfValue(middle) < magnitude) {
      low = static_cast<uint16_t>(middle + 1);
    } else {
      high = middle;
    }
  }
  if (low > 0) {
    const double above = HalfValue(low) - magnitude;
    const double below = magnitude - HalfValue(static_cast<uint16_t>(low - 1));
    if (below < above || (below == above && low % 2 == 1)) low = static_cast<uint16_t>(low - 1);
  }
  return static_cast<uint16_t>(low | (std::signbit(value) ? 0x8000 : 0));
}

// Where results are subnormal, every float32 operation rounds to a multiple of this.
inline constexpr double kSmallestFloat = 0x1p-149;

// ---- BinaryMatMul ----

struct ReferenceWeight {
  std::size_t n = 0;
  std::size_t k = 0;
  std::vector<int64_t> plane_columns;
  int64_t hadamard_block = 0;
  std::vector<std::vector<uint8_t>> bits;  // [plane][row * plane_columns[plane] + column]
  std::vector<uint16_t> alpha;             // half [row][slot]
  std::vector<uint8_t> signs;              // packed, or empty
  std::vector<uint16_t> order;             // columns or chunks, or empty

  std::size_t padded_n() const { return (n + 15) / 16 * 16; }
  std::size_t padded_k() const { return (k + 63) / 64 * 64; }
  // Planes of column j.
  std::size_t planes(std::size_t j) const {
    std::size_t count = 0;
    for (const int64_t columns : plane_columns) count += j < static_cast<std::size_t>(columns);
    return count;
  }
  // Coefficients per row, and the slot of plane 0 in the class with `planes` planes.
  std::size_t slots() const { return slot(0); }
  std::size_t slot(std::size_t planes_of_class) const {
    std::size_t count = 0;
    for (std::size_t c = plane_columns.size(); c > planes_of_class; --c) {
      const int64_t below = c < plane_columns.size() ? plane_columns[c] : 0;
      if (plane_columns[c - 1] > below) count += c;
    }
    return count;
  }
  // +1 or -1.
  double sign(std::size_t plane, std::size_t row, std::size_t j) const {
    return bits[plane][row * static_cast<std::size_t>(plane_columns[plane]) + j] != 0 ? 1.0 : -1.0;
  }
  // alpha of the plane for column j.
  double coefficient(std::size_t plane, std::size_t row, std::size_t j) const {
    return HalfValue(alpha[row * slots() + slot(planes(j)) + plane]);
  }
};

// The tensor `codes`, byte by byte from FORMAT.md.
inline std::vector<uint8_t> PackCodes(const ReferenceWeight& w) {
  std::vector<uint8_t> codes;
  for (std::size_t panel = 0; panel < w.padded_n() / 16; ++panel) {
    for (std::size_t chunk = 0; chunk < w.padded_k() / 64; ++chunk) {
      const std::size_t planes = w.planes(chunk * 64);
      for (std::size_t p = 0; p < planes; p += 2) {
        const bool pair = p + 1 < planes;
        for (std::size_t byte = 0; byte < (pair ? 256U : 128U); ++byte) {
          const std::size_t t = byte / 64;
          const std::size_t r = panel * 16 + byte % 64 / 4;
          const std::size_t e = byte % 4;
          unsigned value = 0;
          for (unsigned i = 0; i < (pair ? 4U : 8U); ++i) {
            const std::size_t j = chunk * 64 + (pair ? 16 : 32) * t + 4 * i + e;
            const auto bit = [&](std::size_t plane) { return w.sign(plane, r, j) > 0 ? 1U : 0U; };
            value |= pair ? (bit(p) | bit(p + 1) << 1) << (2 * i) : bit(p) << i;
          }
          codes.push_back(static_cast<uint8_t>(value));
        }
      }
    }
  }
  return codes;
}

// The tensor `coefficients`: panel, slot, row.
inline std::vector<uint16_t> PackCoefficients(const ReferenceWeight& w) {
  std::vector<uint16_t> packed;
  for (std::size_t panel = 0; panel < w.padded_n() / 16; ++panel) {
    for (std::size_t slot = 0; slot < w.slots(); ++slot) {
      for (std::size_t r = 0; r < 16; ++r) {
        packed.push_back(w.alpha[(panel * 16 + r) * w.slots() + slot]);
      }
    }
  }
  return packed;
}

struct ReferenceTransform {
  std::vector<double> v;
  std::vector<double> error;  // how far a float32 transform may be from v
  bool is_finite = true;
};

inline ReferenceTransform TransformRow(const ReferenceWeight& w, const double* x) {
  std::vector<double> u(w.padded_k(), 0.0);
  std::copy(x, x + w.k, u.begin());
  std::vector<double> error(u.size(), 0.0);
  ReferenceTransform result;
  for (const double value : u) result.is_finite = result.is_finite && std::isfinite(value);
  if (w.hadamard_block > 0) {
    const std::size_t block = static_cast<std::size_t>(w.hadamard_block);
    for (std::size_t j = 0; j < u.size() && !w.signs.empty(); ++j) {
      if ((w.signs[j / 8] >> (j % 8) & 1) == 0) u[j] = -u[j];
    }
    std::vector<double> h(u.size());
    for (std::size_t i = 0; i < u.size(); ++i) {
      const std::size_t start = i / block * block;
      double sum = 0.0;
      double absolute = 0.0;
      for (std::size_t j = 0; j < block; ++j) {
        const int parity = __builtin_popcountll(i % block & j) % 2;
        sum += parity == 0 ? u[start + j] : -u[start + j];
        absolute += std::fabs(u[start + j]);
      }
      h[i] = sum / std::sqrt(static_cast<double>(block));
      // A butterfly network rounds once per stage (log2(block) of them) and for the factor, each by
      // at most FLT_EPSILON / 2 of a partial sum, or to a multiple of the smallest subnormal.
      error[i] = 5.0 * FLT_EPSILON * absolute / std::sqrt(static_cast<double>(block)) +
                 static_cast<double>(block) * kSmallestFloat;
    }
    u = h;
  }
  const std::size_t unit = w.order.size() == u.size() ? 1 : 64;
  for (std::size_t i = 0; i < u.size(); ++i) {
    const std::size_t from = w.order.empty() ? i : w.order[i / unit] * unit + i % unit;
    result.v.push_back(u[from]);
    result.error.push_back(error[from]);
  }
  return result;
}

// One output with the most that a correct kernel may differ from it.
struct ReferenceValue {
  double value = 0.0;
  double bound = 0.0;
};

// The exact product, and the bound for `generic`: that of OPS.md plus the rounding of the
// transform.
inline ReferenceValue ExactProduct(const ReferenceWeight& w, const ReferenceTransform& x,
                                   std::size_t row) {
  ReferenceValue result;
  double absolute = 0.0;
  for (std::size_t j = 0; j < x.v.size(); ++j) {
    double what = 0.0;
    for (std::size_t p = 0; p < w.planes(j); ++p)
      what += w.coefficient(p, row, j) * w.sign(p, row, j);
    result.value += what * x.v[j];
    absolute += std::fabs(what * x.v[j]);
    result.bound += std::fabs(what) * x.error[j];
  }
  const double roundings = 2.0 * static_cast<double>(x.v.size());
  result.bound += roundings * (FLT_EPSILON * absolute + kSmallestFloat);
  return result;
}

// What the int8 rule of OPS.md makes of one chunk: all roundings in float32.
struct Int8Chunk {
  double scale = 0.0;
  std::vector<int> q;
  std::vector<double> error;  // of q * scale, where the transform is not exact in float32
};

inline Int8Chunk QuantizeChunk(const ReferenceTransform& x, std::size_t chunk) {
  Int8Chunk result;
  float largest = 0.0F;
  double transform_error = 0.0;
  for (std::size_t j = chunk * 64; j < chunk * 64 + 64; ++j) {
    largest = std::max(largest, std::fabs(static_cast<float>(x.v[j])));
    transform_error = std::max(transform_error, x.error[j]);
  }
  const float scale = largest / 127.0F;
  result.q.assign(64, 0);
  result.error.assign(64, 0.0);
  if (scale < FLT_MIN) return result;
  result.scale = scale;
  const double scale_error = transform_error / 127.0 + FLT_EPSILON * result.scale;
  for (std::size_t j = 0; j < 64; ++j) {
    const float ratio = static_cast<float>(x.v[chunk * 64 + j]) / scale;
    result.q[j] = static_cast<int>(std::nearbyint(ratio));
    if (transform_error == 0.0) continue;
    // The kernel's v and scale differ a little: so does the product, and near a tie q may be the
    // other neighbour.
    const double shift = (x.error[chunk * 64 + j] + std::fabs(ratio) * scale_error) / result.scale;
    const double from_tie = 0.5 - std::fabs(static_cast<double>(ratio) - result.q[j]);
    result.error[j] =
        std::abs(result.q[j]) * scale_error + (from_tie <= shift ? result.scale : 0.0);
  }
  return result;
}

struct Int8Product {
  ReferenceValue emulated;  // the int8 rule; bound: float32 summation alone
  ReferenceValue exact;     // the exact product; bound: that of OPS.md for int8 kernels
};

// x is finite. `chunks` is QuantizeChunk of every chunk.
inline Int8Product ProductInInt8(const ReferenceWeight& w, const ReferenceTransform& x,
                                 const std::vector<Int8Chunk>& chunks, std::size_t row) {
  Int8Product result;
  double absolute = 0.0;
  for (std::size_t j = 0; j < x.v.size(); ++j) {
    const Int8Chunk& chunk = chunks[j / 64];
    const double activation = chunk.q[j % 64] * chunk.scale;
    const std::size_t planes = w.planes(j);
    for (std::size_t p = 0; p < planes; p += 2) {
      const double a = w.coefficient(p, row, j);
      double level = a * w.sign(p, row, j);
      double rounded = level;
      double step = 0.0;
      if (p + 1 < planes) {
        const double b = w.coefficient(p + 1, row, j);
        level += b * w.sign(p + 1, row, j);
        const float largest = static_cast<float>(std::max(std::fabs(a + b), std::fabs(a - b)));
        const float step32 = largest / 127.0F;
        step = step32;
        rounded = largest == 0.0F ? 0.0 : std::nearbyint(static_cast<float>(level) / step32) * step;
      }
      result.emulated.value += rounded * activation;
      result.emulated.bound += std::fabs(rounded) * chunk.error[j % 64];
      absolute += std::max(std::fabs(rounded * activation), std::fabs(level * x.v[j]));
      result.exact.value += level * x.v[j];
      result.exact.bound += std::fabs(level) * chunk.scale / 2 +
                            step / 2 * (std::fabs(x.v[j]) + chunk.scale / 2) +
                            std::fabs(level) * x.error[j];
      if (chunk.scale == 0.0) result.exact.bound += std::fabs(level) * 127 * double{FLT_MIN};
    }
  }
  // Sums within a block are exact; per chunk and per stream there is a product and a sum.
  const double roundings = static_cast<double>(chunks.size()) + 16.0;
  const double rounding_error = roundings * (FLT_EPSILON * absolute + kSmallestFloat);
  result.emulated.bound += rounding_error;
  result.exact.bound += rounding_error;
  return result;
}

// What the lookup rule of OPS.md makes of one chunk: all roundings in float32.
struct LookupChunk {
  double scale = 0.0;
  int sums[16][16] = {};      // [4 t + e][c]
  double error[16][16] = {};  // of sums * scale, where the transform is not exact in float32
};

inline LookupChunk MakeLookupChunk(const ReferenceTransform& x, std::size_t chunk) {
  LookupChunk result;
  const auto column = [&](std::size_t group, std::size_t i) {
    return chunk * 64 + 16 * (group / 4) + 4 * i + group % 4;
  };
  float largest = 0.0F;
  double transform_error = 0.0;
  for (std::size_t group = 0; group < 16; ++group) {
    float quarters[4];
    double group_error = 0.0;
    for (std::size_t i = 0; i < 4; ++i) {
      quarters[i] = std::fabs(static_cast<float>(x.v[column(group, i)])) * 0.25F;
      group_error += x.error[column(group, i)];
    }
    largest = std::max(largest, (quarters[0] + quarters[1]) + (quarters[2] + quarters[3]));
    transform_error = std::max(transform_error, group_error);
  }
  const float scale = largest / 31.75F;
  if (scale < FLT_MIN) return result;
  result.scale = scale;
  const float inverse = 1.0F / scale;
  const double scale_error = transform_error / 127.0 + 4.0 * FLT_EPSILON * result.scale;
  for (std::size_t group = 0; group < 16; ++group) {
    for (unsigned c = 0; c < 16; ++c) {
      float terms[4];
      double error = 0.0;
      for (std::size_t i = 0; i < 4; ++i) {
        const float ratio = static_cast<float>(x.v[column(group, i)]) * inverse;
        terms[i] = (c >> i & 1U) != 0 ? ratio : -ratio;
        error += x.error[column(group, i)];
      }
      const float sum = (terms[0] + terms[1]) + (terms[2] + terms[3]);
      const int rounded = static_cast<int>(std::nearbyint(sum));
      result.sums[group][c] = rounded;
      if (transform_error == 0.0) continue;
      // As in QuantizeChunk. Sums of up to 127 are rounded in float32 to within 127 FLT_EPSILON.
      const double shift = (error + 127.0 * scale_error) / result.scale + 254.0 * FLT_EPSILON;
      const double from_tie = 0.5 - std::fabs(static_cast<double>(sum) - rounded);
      result.error[group][c] =
          std::abs(rounded) * scale_error + (from_tie <= shift ? result.scale : 0.0);
    }
  }
  return result;
}

struct LookupProduct {
  ReferenceValue emulated;  // the lookup rule; bound: float32 summation alone
  ReferenceValue exact;     // the exact product; bound: that of OPS.md for the lookup rule
};

// A unit of the wide lookup rule of OPS.md: its groups, and its scale in float32.
struct WideUnit {
  std::vector<std::vector<std::size_t>> groups;  // columns, 4 or 5 each
  double scale = 0.0;
  float inverse = 0.0F;
  double scale_error = 0.0;  // where the transform is not exact in float32
};

// A unit that looks up `chunks` chunks from `chunk` on. If a fifth chunk is given, the groups of
// the unit's chunk number n take their fifth columns from its columns 16 t + 4 (position + n) + e.
inline WideUnit MakeWideUnit(const ReferenceTransform& x, std::size_t chunk, std::size_t chunks,
                             const std::size_t* fifth_chunk, std::size_t position) {
  WideUnit unit;
  float largest = 0.0F;
  double transform_error = 0.0;
  for (std::size_t group = 0; group < 16 * chunks; ++group) {
    const std::size_t n = group / 16;
    const std::size_t t = group % 16 / 4;
    const std::size_t e = group % 4;
    std::vector<std::size_t> columns;
    for (std::size_t i = 0; i < 4; ++i) columns.push_back(64 * (chunk + n) + 16 * t + 4 * i + e);
    if (fifth_chunk != nullptr)
      columns.push_back(64 * *fifth_chunk + 16 * t + 4 * (position + n) + e);
    float eighths[5] = {};
    double group_error = 0.0;
    for (std::size_t i = 0; i < columns.size(); ++i) {
      eighths[i] = std::fabs(static_cast<float>(x.v[columns[i]])) * 0.125F;
      group_error += x.error[columns[i]];
    }
    const float sum = (eighths[0] + eighths[1]) + (eighths[2] + eighths[3]);
    largest = std::max(largest, sum + eighths[4]);
    transform_error = std::max(transform_error, group_error);
    unit.groups.push_back(columns);
  }
  const float scale = largest / 15.875F;
  if (scale < FLT_MIN) return unit;
  unit.scale = scale;
  unit.inverse = 1.0F / scale;
  if (transform_error > 0.0) {
    unit.scale_error = transform_error / 127.0 + 4.0 * FLT_EPSILON * unit.scale;
  }
  return unit;
}

// The units of all classes.
inline std::vector<WideUnit> MakeWideUnits(const ReferenceWeight& w, const ReferenceTransform& x) {
  std::vector<WideUnit> units;
  const std::size_t chunks = w.padded_k() / 64;
  for (std::size_t begin = 0; begin < chunks;) {
    std::size_t end = begin;
    while (end < chunks && w.planes(64 * end) == w.planes(64 * begin)) ++end;
    for (; end - begin >= 5; begin += 5) {
      const std::size_t fifth = begin + 4;
      units.push_back(MakeWideUnit(x, begin, 2, &fifth, 0));
      units.push_back(MakeWideUnit(x, begin + 2, 2, &fifth, 2));
    }
    for (; begin < end; begin += std::min<std::size_t>(2, end - begin)) {
      units.push_back(MakeWideUnit(x, begin, std::min<std::size_t>(2, end - begin), nullptr, 0));
    }
  }
  return units;
}

// What the wide lookup rule makes of coefficients: q * step.
struct WideCoefficients {
  double exact[2] = {};
  double rounded[2] = {};
  double step = 0.0;  // 0 for a single plane
  std::size_t planes = 1;
};

inline WideCoefficients RoundCoefficients(const ReferenceWeight& w, std::size_t p, std::size_t row,
                                          std::size_t j) {
  WideCoefficients result;
  result.planes = p + 1 < w.planes(j) ? 2 : 1;
  float largest = 0.0F;
  for (std::size_t i = 0; i < result.planes; ++i) {
    result.exact[i] = w.coefficient(p + i, row, j);
    result.rounded[i] = result.exact[i];
    largest = std::max(largest, std::fabs(static_cast<float>(result.exact[i])));
  }
  if (result.planes == 1 || largest == 0.0F) return result;
  const float step = largest / 127.0F;
  result.step = step;
  for (std::size_t i = 0; i < 2; ++i) {
    result.rounded[i] = std::nearbyint(static_cast<float>(result.exact[i]) / step) * result.step;
  }
  return result;
}

// The sum of a group for the signs of a row and plane, times the scale; its error as in
// LookupChunk.
inline ReferenceValue WideSum(const ReferenceTransform& x, const WideUnit& unit,
                              const std::vector<std::size_t>& columns,
                              const std::vector<double>& signs) {
  float terms[5] = {};
  double error = 0.0;
  for (std::size_t i = 0; i < columns.size(); ++i) {
    const float ratio = static_cast<float>(x.v[columns[i]]) * unit.inverse;
    terms[i] = signs[i] > 0 ? ratio : -ratio;
    error += x.error[columns[i]];
  }
  const float sum = ((terms[0] + terms[1]) + (terms[2] + terms[3])) + terms[4];
  const double rounded = std::nearbyint(sum);
  ReferenceValue result = {rounded * unit.scale, 0.0};
  if (unit.scale_error == 0.0) return result;
  const double shift = (error + 127.0 * unit.scale_error) / unit.scale + 254.0 * FLT_EPSILON;
  const double from_tie = 0.5 - std::fabs(static_cast<double>(sum) - rounded);
  result.bound = std::fabs(rounded) * unit.scale_error + (from_tie <= shift ? unit.scale : 0.0);
  return result;
}

// x is finite. `units` is MakeWideUnits.
inline LookupProduct ProductByWideLookup(const ReferenceWeight& w, const ReferenceTransform& x,
                                         const std::vector<WideUnit>& units, std::size_t row) {
  LookupProduct result;
  double absolute = 0.0;
  for (const WideUnit& unit : units) {
    const std::size_t planes = w.planes(unit.groups[0][0]);
    for (std::size_t p = 0; p < planes; ++p) {
      const WideCoefficients pair = RoundCoefficients(w, p / 2 * 2, row, unit.groups[0][0]);
      const double alpha = pair.exact[p % 2];
      const double factor = pair.rounded[p % 2];
      for (const std::vector<std::size_t>& columns : unit.groups) {
        std::vector<double> signs;
        double exact = 0.0;
        double magnitude = 0.0;
        for (const std::size_t j : columns) {
          signs.push_back(w.sign(p, row, j));
          exact += signs.back() * x.v[j];
          magnitude += std::fabs(x.v[j]);
          result.exact.bound += std::fabs(alpha) * x.error[j];
        }
        const ReferenceValue sum = WideSum(x, unit, columns, signs);
        absolute += std::fabs(factor * sum.value) + std::fabs(alpha) * magnitude;
        result.emulated.value += factor * sum.value;
        result.emulated.bound += std::fabs(factor) * sum.bound;
        result.exact.value += alpha * exact;
        result.exact.bound +=
            std::fabs(factor) * 0.501 * unit.scale + 0.501 * pair.step * magnitude;
        if (unit.scale == 0.0) result.exact.bound += std::fabs(alpha) * 127 * double{FLT_MIN};
      }
    }
  }
  // Sums within a unit are exact; per unit and per stream there is a product and a sum.
  const double roundings = static_cast<double>(units.size()) + 16.0;
  const double rounding_error = roundings * (FLT_EPSILON * absolute + kSmallestFloat);
  result.emulated.bound += rounding_error;
  result.exact.bound += rounding_error;
  return result;
}

// x is finite. `chunks` is MakeLookupChunk of every chunk.
inline LookupProduct ProductByLookup(const ReferenceWeight& w, const ReferenceTransform& x,
                                     const std::vector<LookupChunk>& chunks, std::size_t row) {
  LookupProduct result;
  double absolute = 0.0;
  for (std::size_t k = 0; k < chunks.size(); ++k) {
    const LookupChunk& chunk = chunks[k];
    for (std::size_t p = 0; p < w.planes(64 * k); ++p) {
      const double alpha = w.coefficient(p, row, 64 * k);
      for (std::size_t group = 0; group < 16; ++group) {
        unsigned c = 0;
        double exact = 0.0;
        for (std::size_t i = 0; i < 4; ++i) {
          const std::size_t j = 64 * k + 16 * (group / 4) + 4 * i + group % 4;
          const double sign = w.sign(p, row, j);
          if (sign > 0) c |= 1U << i;
          exact += sign * x.v[j];
          absolute += std::fabs(alpha * x.v[j]);
          result.exact.bound += std::fabs(alpha) * x.error[j];
        }
        const double rounded = chunk.sums[group][c] * chunk.scale;
        absolute += std::fabs(alpha * rounded);
        result.emulated.value += alpha * rounded;
        result.emulated.bound += std::fabs(alpha) * chunk.error[group][c];
        result.exact.value += alpha * exact;
        result.exact.bound += std::fabs(alpha) * 0.501 * chunk.scale;
        if (chunk.scale == 0.0) result.exact.bound += std::fabs(alpha) * 127 * double{FLT_MIN};
      }
    }
  }
  // Sums within a chunk are exact; per chunk and per plane there is a product and a sum.
  const double roundings = static_cast<double>(chunks.size()) + 16.0;
  const double rounding_error = roundings * (FLT_EPSILON * absolute + kSmallestFloat);
  result.emulated.bound += rounding_error;
  result.exact.bound += rounding_error;
  return result;
}

// ---- TokenPrune ----

struct ReferencePrune {
  std::string mode = "mmr";
  int64_t keep_count = -1;
  float keep_ratio = -1.0F;
  int64_t min_keep = 1;
  float theta = 0.5F;
  uint64_t seed = 0;
  std::size_t b = 1;
  std::size_t s = 0;
  std::size_t dim = 0;
  std::vector<float> scores;      // (b, heads, s), or empty
  std::vector<int32_t> segments;  // or empty
  std::vector<int64_t> keep;      // one, (b) or (b, keep_segments), or empty
  std::size_t keep_segments = 0;
  std::vector<double> metric;  // (b, s, dim)
  std::size_t heads = 1;
  std::string score_reduce = "mean";
  std::string first = "auto";
  std::string similarity = "cosine";
  std::string merge = "none";
  std::string order = "input";
  std::size_t width = 0;
  std::vector<float> hidden;  // (b, s, width)
};

struct ReferencePruned {
  std::vector<std::vector<int64_t>> kept;
  std::vector<int64_t> token_map;          // (b, s)
  std::vector<std::vector<float>> pruned;  // of each row: (kept, width)
};

// All four words of Philox4x32-10, as Salmon et al. write it.
inline std::vector<uint32_t> ReferencePhilox(std::vector<uint32_t> c, std::vector<uint32_t> k) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ULL * c[0];
    const uint64_t p1 = 0xCD9E8D57ULL * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1 & 0xFFFFFFFF),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0 & 0xFFFFFFFF)};
    k = {k[0] + 0x9E3779B9U, k[1] + 0xBB67AE85U};
  }
  return c;
}

inline float ReferenceSimilarity(const ReferencePrune& p, std::size_t i, std::size_t j) {
  double dot = 0.0;
  double ii = 0.0;
  double jj = 0.0;
  for (std::size_t d = 0; d < p.dim; ++d) {
    const double a = p.metric[i * p.dim + d];
    const double c = p.metric[j * p.dim + d];
    dot += a * c;
    ii += a * a;
    jj += c * c;
  }
  const auto has_direction = [](double norm) {
    const float length = static_cast<float>(std::sqrt(norm));
    return std::isfinite(length) && length > 0.0F;
  };
  if (!has_direction(ii) || !has_direction(jj)) return 0.0F;
  if (p.similarity == "cosine") return static_cast<float>(dot / std::sqrt(ii * jj));
  constexpr double kLargest = std::numeric_limits<float>::max();
  return static_cast<float>(std::max(-kLargest, std::min(kLargest, dot)));
}

inline bool ReferenceHasDirection(const ReferencePrune& p, std::size_t i) {
  double norm = 0.0;
  for (std::size_t d = 0; d < p.dim; ++d) norm += std::pow(p.metric[i * p.dim + d], 2);
  const float length = static_cast<float>(std::sqrt(norm));
  return std::isfinite(length) && length > 0.0F;
}

// Of the token with the number `i` = row * s + token.
inline float ReferenceScore(const ReferencePrune& p, std::size_t i) {
  const float* scores = p.scores.data() + i / p.s * p.heads * p.s + i % p.s;
  double total = p.score_reduce == "max" ? -std::numeric_limits<double>::infinity() : 0.0;
  for (std::size_t h = 0; h < p.heads; ++h) {
    const double score = scores[h * p.s];
    if (std::isnan(score)) return std::numeric_limits<float>::quiet_NaN();
    total = p.score_reduce == "max" ? std::max(total, score) : total + score;
  }
  const double divisor = p.score_reduce == "mean" ? static_cast<double>(p.heads) : 1.0;
  return static_cast<float>(total / divisor);
}

// z of OPS.md.
inline std::vector<double> ReferenceZ(const std::vector<double>& scores) {
  double low = std::numeric_limits<double>::infinity();
  double high = -low;
  for (const double s : scores) {
    if (std::isfinite(s)) low = std::min(low, s);
    if (std::isfinite(s)) high = std::max(high, s);
  }
  std::vector<double> z;
  for (const double s : scores) {
    if (!std::isfinite(s)) {
      z.push_back(s > 0 ? 1.0 : 0.0);
    } else {
      z.push_back(high > low ? (s - low) / (high - low) : 0.5);
    }
  }
  return z;
}

// Index of the largest value among those not yet chosen; the first of equal ones.
inline std::size_t ArgMax(const std::vector<double>& values, const std::vector<bool>& chosen) {
  std::size_t best = values.size();
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!chosen[i] && (best == values.size() || values[i] > values[best])) best = i;
  }
  return best;
}

// Positions to keep of one segment whose tokens are `tokens` (numbers of rows of metric), in the
// order of their choice. Slow: everything is computed anew for every choice.
inline std::vector<std::size_t> ReferenceSelect(const ReferencePrune& p, int32_t segment,
                                                const std::vector<std::size_t>& tokens,
                                                std::size_t k) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const std::size_t n = tokens.size();
  std::vector<double> scores(n, 0.0);
  bool all_nan = !p.scores.empty();
  for (std::size_t i = 0; i < n && !p.scores.empty(); ++i) {
    scores[i] = ReferenceScore(p, tokens[i]);
    if (std::isnan(scores[i])) {
      scores[i] = -kInf;
    } else {
      all_nan = false;
    }
  }
  const bool maxmin_without =
      p.mode == "maxmin" && (p.first == "max_norm" || p.first == "farthest");
  const bool uses_scores = p.mode != "random" && !maxmin_without && !p.scores.empty();
  if (p.mode == "uniform" || (uses_scores && all_nan)) {
    std::vector<std::size_t> result;
    for (std::size_t i = 0; i < k; ++i) result.push_back((2 * i + 1) * n / (2 * k));
    return result;
  }

  std::vector<double> first = scores;
  const std::vector<double> z = p.scores.empty() ? std::vector<double>(n, 1.0) : ReferenceZ(scores);
  std::vector<std::vector<double>> similar(n, std::vector<double>(n));
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < n; ++j) {
      similar[i][j] = double{ReferenceSimilarity(p, tokens[i], tokens[j])};
    }
  }
  for (std::size_t t = 0; p.mode == "random" && t < n; ++t) {
    first[t] = ReferencePhilox(
        {static_cast<uint32_t>(t), static_cast<uint32_t>(segment), 0, 0},
        {static_cast<uint32_t>(p.seed & 0xFFFFFFFF), static_cast<uint32_t>(p.seed >> 32)})[0];
  }
  for (std::size_t i = 0; p.mode == "maxmin" && i < n; ++i) {
    if (p.first == "farthest") {
      double nearest = -kInf;
      for (std::size_t j = 0; j < n; ++j) {
        if (j != i) nearest = std::max(nearest, similar[i][j]);
      }
      first[i] = -nearest;
    } else if (p.first == "max_norm" || p.scores.empty()) {
      double norm = 0.0;
      for (std::size_t d = 0; d < p.dim; ++d) norm += std::pow(p.metric[tokens[i] * p.dim + d], 2);
      first[i] = ReferenceHasDirection(p, tokens[i]) ? norm : 0.0;
    }
  }
  if (p.mode == "mmr") first = z;

  std::vector<bool> chosen(n, false);
  std::vector<std::size_t> result;
  const auto choose = [&](const std::vector<double>& value, const std::vector<bool>& closed) {
    result.push_back(ArgMax(value, closed));
    chosen[result.back()] = true;
  };
  const double theta = double{p.theta};
  std::vector<double> residual(n);
  std::vector<std::vector<double>> factors;
  for (std::size_t i = 0; i < n; ++i) residual[i] = similar[i][i];
  while (p.mode == "dpp" && result.size() < k) {
    std::vector<double> value(n);
    std::vector<bool> closed = chosen;
    for (std::size_t i = 0; i < n; ++i) {
      closed[i] = closed[i] || !(residual[i] > 1e-4 * similar[i][i]);
      const double weight = theta < 1 ? theta / (1 - theta) * z[i] : 2 * std::log(z[i] + 1e-6);
      value[i] = closed[i] ? 0.0 : weight + std::log(double{static_cast<float>(residual[i])});
    }
    if (ArgMax(value, closed) == n) break;
    choose(value, closed);
    const std::size_t best = result.back();
    std::vector<double> row = similar[best];
    const double pivot = std::sqrt(residual[best]);
    for (std::size_t i = 0; i < n; ++i) {
      for (const std::vector<double>& factor : factors) row[i] -= factor[best] * factor[i];
      row[i] /= pivot;
      residual[i] -= row[i] * row[i];
    }
    factors.push_back(row);
  }
  while (result.size() < k) {
    std::vector<double> value = first;
    for (std::size_t i = 0; i < n; ++i) {
      if (p.mode == "coverage") {
        double gain = 0.0;
        for (std::size_t j = 0; j < n; ++j) {
          double covered = 0.0;
          for (const std::size_t u : result) covered = std::max(covered, similar[u][j]);
          gain += z[j] * std::max(0.0, similar[i][j] - covered);
        }
        value[i] = double{static_cast<float>(gain)};
      } else if (p.mode == "dpp" || ((p.mode == "mmr" || p.mode == "maxmin") && !result.empty())) {
        double largest = -double{std::numeric_limits<float>::max()};
        for (const std::size_t j : result) largest = std::max(largest, similar[i][j]);
        const double weight = p.mode == "mmr" ? theta : 0.0;
        value[i] = weight * z[i] - (1.0 - weight) * largest;
      }
    }
    choose(value, chosen);
  }
  return result;
}

inline std::size_t ReferenceCount(const ReferencePrune& p, std::size_t n, std::size_t row,
                                  int32_t segment) {
  int64_t k = static_cast<int64_t>(n);
  if (p.mode == "none") return n;
  if (!p.keep.empty()) {
    std::size_t at = p.keep.size() == 1 ? 0 : row;
    if (p.keep_segments > 0) at = row * p.keep_segments + static_cast<std::size_t>(segment);
    return static_cast<std::size_t>(std::min(k, p.keep[at]));
  }
  if (p.keep_count >= 0) {
    k = std::min(k, std::max(p.min_keep, p.keep_count));
  } else if (p.keep_ratio >= 0.0F) {
    const double share = static_cast<double>(n) * double{p.keep_ratio} - 1e-6;
    k = std::min(k, std::max(p.min_keep, static_cast<int64_t>(std::ceil(share))));
  }
  return static_cast<std::size_t>(k);
}

// Adds to `into` and `weight` what a segment merges; `chosen` are positions in `tokens`.
inline void ReferenceMerge(const ReferencePrune& p, const std::vector<std::size_t>& tokens,
                           const std::vector<std::size_t>& chosen, std::vector<int64_t>* into,
                           std::vector<double>* weight) {
  std::vector<double> scores;
  for (const std::size_t token : tokens) {
    const float score = p.scores.empty() ? 0.0F : ReferenceScore(p, token);
    scores.push_back(std::isnan(score) ? -std::numeric_limits<double>::infinity() : double{score});
  }
  const std::vector<double> z = ReferenceZ(scores);
  std::vector<bool> has_direction;
  for (const std::size_t token : tokens) has_direction.push_back(ReferenceHasDirection(p, token));
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (std::find(chosen.begin(), chosen.end(), i) != chosen.end()) continue;
    bool usable = has_direction[i];
    for (std::size_t d = 0; d < p.width; ++d) {
      usable = usable && std::isfinite(p.hidden[tokens[i] * p.width + d]);
    }
    float best = 0.0F;
    for (std::size_t j = 0; usable && j < tokens.size(); ++j) {
      if (std::find(chosen.begin(), chosen.end(), j) == chosen.end()) continue;
      if (!has_direction[j]) continue;
      const float similarity = ReferenceSimilarity(p, tokens[i], tokens[j]);
      int64_t& target = (*into)[tokens[i]];
      if (target >= 0 && similarity <= best) continue;
      best = similarity;
      target = static_cast<int64_t>(tokens[j]);
      (*weight)[tokens[i]] = p.merge == "mean" ? 1.0 : z[i];
    }
  }
}

inline ReferencePruned ReferenceTokenPrune(const ReferencePrune& p) {
  ReferencePruned result;
  std::vector<int64_t> into(p.b * p.s, -1);  // of merged tokens: the kept one
  std::vector<double> weight(p.b * p.s, 0.0);
  result.token_map.assign(p.b * p.s, -1);
  for (std::size_t row = 0; row < p.b; ++row) {
    std::vector<std::size_t> kept;
    std::map<int32_t, std::vector<std::size_t>> groups;
    for (std::size_t t = 0; t < p.s; ++t) {
      const int32_t id = p.segments.empty() ? 0 : p.segments[row * p.s + t];
      if (id == -1) kept.push_back(row * p.s + t);
      if (id >= 0) groups[id].push_back(row * p.s + t);
    }
    std::map<std::size_t, std::size_t> instead;  // of a slot's token by `input` order
    for (const auto& [id, tokens] : groups) {
      const std::size_t k = ReferenceCount(p, tokens.size(), row, id);
      std::vector<std::size_t> chosen;
      if (k == tokens.size()) {
        for (std::size_t i = 0; i < k; ++i) chosen.push_back(i);
      } else if (k > 0) {
        chosen = ReferenceSelect(p, id, tokens, k);
        if (p.merge != "none") ReferenceMerge(p, tokens, chosen, &into, &weight);
      }
      std::vector<std::size_t> rising = chosen;
      std::sort(rising.begin(), rising.end());
      for (std::size_t i = 0; i < k; ++i) {
        kept.push_back(tokens[chosen[i]]);
        if (p.order == "score") instead[tokens[rising[i]]] = tokens[chosen[i]];
      }
    }
    std::sort(kept.begin(), kept.end());
    for (std::size_t& token : kept) {
      if (instead.count(token) > 0) token = instead[token];
    }
    result.kept.emplace_back();
    result.pruned.emplace_back();
    for (const std::size_t token : kept) {
      result.token_map[token] = static_cast<int64_t>(result.kept.back().size());
      result.kept.back().push_back(static_cast<int64_t>(token - row * p.s));
      for (std::size_t d = 0; d < p.width; ++d) {
        double sum = p.hidden[token * p.width + d];
        double weights = 1.0;
        bool is_mean = false;
        for (std::size_t t = row * p.s; t < (row + 1) * p.s; ++t) {
          if (into[t] != static_cast<int64_t>(token)) continue;
          sum += weight[t] * double{p.hidden[t * p.width + d]};
          weights += weight[t];
          is_mean = true;
        }
        result.pruned.back().push_back(is_mean ? static_cast<float>(sum / weights)
                                               : p.hidden[token * p.width + d]);
      }
    }
    for (std::size_t t = row * p.s; t < (row + 1) * p.s; ++t) {
      if (into[t] >= 0) result.token_map[t] = result.token_map[static_cast<std::size_t>(into[t])];
    }
  }
  return result;
}

}  // namespace bivlm::testing

#endif  // BIVLM_TESTS_REFERENCE_H_
