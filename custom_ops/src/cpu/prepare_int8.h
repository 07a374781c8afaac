// BinaryMatMulFunctions::prepare of int8 rows: the transform of activations and their rounding, for
// vectors of any length.
//
// `Isa` is a struct `Vectors` (vectors_<isa>.h) in an anonymous namespace, so that what is
// instantiated with it stays in its object file.
#ifndef BIVLM_CPU_PREPARE_INT8_H_
#define BIVLM_CPU_PREPARE_INT8_H_

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#include "int8_rows.h"

namespace bivlm {

template <typename Isa>
struct PrepareInt8 {
  using Vec = typename Isa::Vec;
  using Bits = typename Isa::Bits;
  using Ints = typename Isa::Ints;
  static constexpr std::size_t kLanes = Isa::kLanes;

  static Vec Load(const float* floats) {
    Vec v;
    std::memcpy(&v, floats, sizeof(v));
    return v;
  }
  static void Store(float* floats, Vec v) { std::memcpy(floats, &v, sizeof(v)); }

  // u (k_padded) = one row of x, padded with zeros.
  static void LoadRow(const BinaryMatMulArgs& args, std::size_t row, float* u) {
    const std::size_t k = args.weight->k;
    if (args.type == ElementType::kFloat32) {
      std::memcpy(u, static_cast<const float*>(args.x) + row * k, k * sizeof(float));
    } else {
      Isa::FromHalves(static_cast<const uint16_t*>(args.x) + row * k, k, u);
    }
    std::fill(u + k, u + args.weight->k_padded, 0.0F);
  }

  // The butterflies between lanes that differ in the bits h, 2 h, ..: the lane without the bit gets
  // the sum, the one with it the difference. The product with +-1 is exact.
  template <std::size_t h = 1>
  static Vec HadamardInLanes(Vec v) {
    if constexpr (h == kLanes) {
      return v;
    } else {
      const Vec sign = (Isa::Lanes() & static_cast<uint32_t>(h)) != 0 ? Vec{} - 1.0F : Vec{} + 1.0F;
      return HadamardInLanes<2 * h>(Isa::MultiplyAdd(v, sign, Isa::template Swap<h>(v)));
    }
  }

  // `factor` with the signs of kLanes channels: + where the bit is 1.
  static Vec SignedFactor(uint32_t bits, Vec factor) {
    const Bits is_minus = ((bits >> Isa::Lanes()) & 1U) ^ 1U;
    return (Vec)((Bits)factor ^ is_minus << 31);
  }

  // u = H diag(signs) u / sqrt(block) for every block.
  static void SignedHadamard(const BinaryMatMulWeight& weight, float* u) {
    const std::size_t block = weight.hadamard_block;
    const Vec factor = Vec{} + 1.0F / std::sqrt(static_cast<float>(block));
    for (std::size_t start = 0; start < weight.k_padded; start += block) {
      for (std::size_t j = start; j < start + block; j += kLanes) {
        const uint32_t bits =
            weight.signs == nullptr ? 0xFFU : uint32_t{weight.signs[j / 8]} >> j % 8;
        Store(u + j, HadamardInLanes(Load(u + j) * SignedFactor(bits, factor)));
      }
      for (std::size_t half = kLanes; half < block; half *= 2) {
        for (std::size_t j = start; j < start + block; j += 2 * half) {
          for (std::size_t i = j; i < j + half; i += kLanes) {
            const Vec a = Load(u + i);
            const Vec b = Load(u + i + half);
            Store(u + i, a + b);
            Store(u + i + half, a - b);
          }
        }
      }
    }
  }

  // kLanes channels of v, from column j on.
  static Vec Ordered(const BinaryMatMulWeight& weight, const float* u, std::size_t j) {
    if (weight.order == nullptr) return Load(u + j);
    if (weight.order_has_chunks) {
      uint16_t chunk = 0;
      std::memcpy(&chunk, weight.order + 2 * (j / kChunkColumns), sizeof(chunk));
      return Load(u + chunk * kChunkColumns + j % kChunkColumns);
    }
    return Isa::Gather(u, weight.order + 2 * j);
  }

  // Rounds one chunk of v. Returns whether it is finite.
  static bool QuantizeChunk(const BinaryMatMulWeight& weight, const float* u, std::size_t chunk,
                            const Int8Row& row) {
    constexpr std::size_t kVectors = kChunkColumns / kLanes;
    Vec v[kVectors];
    Bits magnitude = {};
    for (std::size_t i = 0; i < kVectors; ++i) {
      v[i] = Ordered(weight, u, chunk * kChunkColumns + i * kLanes);
      const Bits bits = (Bits)v[i] & 0x7FFFFFFFU;
      magnitude = bits > magnitude ? bits : magnitude;
    }
    const uint32_t largest = Isa::Largest(magnitude);
    const float scale = FloatFromBits(largest) / 127.0F;
    int8_t* q = row.q + chunk * kChunkColumns;
    if (largest >= kInfinityBits || scale < FLT_MIN) {
      std::memset(q, 0, kChunkColumns);
      row.scale[chunk] = 0.0F;
      row.sum[chunk] = 0;
      return largest < kInfinityBits;
    }
    Ints sum = {};
    for (std::size_t i = 0; i < kVectors; i += 4) {
      Ints r[4];
      for (std::size_t part = 0; part < 4; ++part) {
        r[part] = Isa::Round(v[i + part] / scale);
        sum += r[part];
      }
      Isa::SaveBytes(r, q + i * kLanes);
    }
    row.scale[chunk] = scale;
    row.sum[chunk] = Isa::Sum(sum);
    return true;
  }

  static void Rows(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                   std::byte* prepared, float* work) {
    const BinaryMatMulWeight& weight = *args.weight;
    for (std::size_t r = row_begin; r < row_end; ++r, prepared += Int8RowBytes(weight)) {
      const Int8Row row = Int8RowAt(weight, prepared);
      LoadRow(args, r, work);
      if (weight.hadamard_block > 0) SignedHadamard(weight, work);
      bool is_finite = true;
      for (std::size_t chunk = 0; chunk < weight.chunks(); ++chunk) {
        is_finite = QuantizeChunk(weight, work, chunk, row) && is_finite;
      }
      if (is_finite) continue;
      std::fill(row.scale, row.scale + weight.chunks(), std::numeric_limits<float>::quiet_NaN());
    }
  }
};

}  // namespace bivlm

#endif  // BIVLM_CPU_PREPARE_INT8_H_
