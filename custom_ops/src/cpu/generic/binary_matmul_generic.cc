// BinaryMatMul in float32 on any CPU: the exact form that OPS.md defines.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "bivlm/binary_matmul.h"

namespace bivlm {
namespace {

constexpr std::size_t kTileRows = 32;
constexpr std::size_t kMaxLevels = std::size_t{1} << kMaxPlanes;

// One float per row of a panel, in vectors of the length that every CPU with vectors has.
constexpr std::size_t kLanes = 4;
constexpr std::size_t kVectors = kPanelRows / kLanes;
using Vector = float __attribute__((vector_size(kLanes * sizeof(float))));
struct Rows {
  Vector part[kVectors];
};

std::size_t RowBytes(const BinaryMatMulWeight& weight) { return weight.k_padded * sizeof(float); }

// Replaces u by H_size u / sqrt(size), H the Sylvester matrix.
void Hadamard(float* u, std::size_t size) {
  for (std::size_t half = 1; half < size; half *= 2) {
    for (std::size_t start = 0; start < size; start += 2 * half) {
      for (std::size_t i = start; i < start + half; ++i) {
        const float a = u[i];
        const float b = u[i + half];
        u[i] = a + b;
        u[i + half] = a - b;
      }
    }
  }
  const float scale = 1.0F / std::sqrt(static_cast<float>(size));
  for (std::size_t i = 0; i < size; ++i) u[i] *= scale;
}

// v (k_padded) = the transform of one row of x; u is work space of the same size.
void Transform(const BinaryMatMulArgs& args, std::size_t row, float* u, float* v) {
  const BinaryMatMulWeight& weight = *args.weight;
  if (args.type == ElementType::kFloat32) {
    std::memcpy(u, static_cast<const float*>(args.x) + row * weight.k, weight.k * sizeof(float));
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(args.x) + row * weight.k;
    for (std::size_t j = 0; j < weight.k; ++j) u[j] = FloatFromHalf(x[j]);
  }
  std::fill(u + weight.k, u + weight.k_padded, 0.0F);
  if (weight.hadamard_block > 0) {
    for (std::size_t j = 0; weight.signs != nullptr && j < weight.k_padded; ++j) {
      if ((weight.signs[j / 8] >> (j % 8) & 1) == 0) u[j] = -u[j];
    }
    for (std::size_t j = 0; j < weight.k_padded; j += weight.hadamard_block) {
      Hadamard(u + j, weight.hadamard_block);
    }
  }
  const std::size_t unit = weight.order_has_chunks ? kChunkColumns : 1;
  for (std::size_t i = 0; i < weight.k_padded / unit; ++i) {
    uint16_t from = static_cast<uint16_t>(i);
    if (weight.order == nullptr) {
      std::memcpy(v, u, weight.k_padded * sizeof(float));
      break;
    }
    std::memcpy(&from, weight.order + 2 * i, sizeof(from));
    std::memcpy(v + i * unit, u + from * unit, unit * sizeof(float));
  }
}

void Prepare(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
             std::byte* prepared, float* work) {
  const std::size_t k_padded = args.weight->k_padded;
  float* v = reinterpret_cast<float*>(prepared);
  for (std::size_t row = row_begin; row < row_end; ++row, v += k_padded) {
    Transform(args, row, work, v);
    if (!std::all_of(v, v + k_padded, [](float value) { return std::isfinite(value); })) {
      std::fill(v, v + k_padded, std::numeric_limits<float>::quiet_NaN());
    }
  }
}

// levels[c][r] = sum over planes p of +-alpha_p, + where bit p of c is 1, for row r of a panel.
// In float64 and rounded once: alpha_p may cancel.
void MakeLevels(const uint8_t* coefficients, std::size_t planes,
                float (&levels)[kMaxLevels][kPanelRows]) {
  for (std::size_t c = 0; c < std::size_t{1} << planes; ++c) {
    for (std::size_t r = 0; r < kPanelRows; ++r) {
      double level = 0.0;
      for (std::size_t p = 0; p < planes; ++p) {
        const double alpha = LoadHalf(coefficients + 2 * (p * kPanelRows + r));
        level += (c >> p & 1) != 0 ? alpha : -alpha;
      }
      levels[c][r] = static_cast<float>(level);
    }
  }
}

// codes[j][r] = the bits of column j, row r, of a chunk with `planes` planes: plane p at bit p.
void UnpackChunk(const uint8_t* bytes, std::size_t planes,
                 uint8_t (&codes)[kChunkColumns][kPanelRows]) {
  std::memset(codes, 0, sizeof(codes));
  for (std::size_t plane = 0; plane < planes; plane += 2) {
    const std::size_t width = plane + 1 < planes ? 2 : 1;  // planes of this block
    const std::size_t steps = 8 / width;                   // columns of one byte
    const unsigned mask = (1U << width) - 1U;
    for (std::size_t j = 0; j < kChunkColumns; ++j) {
      const std::size_t t = j / (4 * steps);
      const std::size_t shift = width * (j / 4 % steps);
      const uint8_t* column = bytes + 64 * t + j % 4;
      for (std::size_t r = 0; r < kPanelRows; ++r) {
        codes[j][r] |= static_cast<uint8_t>((column[4 * r] >> shift & mask) << plane);
      }
    }
    bytes += width * kPlaneBlockBytes;
  }
}

// sums += sum over the columns of a chunk of w[j] * v[j].
void AddChunk(const float (&w)[kChunkColumns][kPanelRows], const float* v, Rows* sums) {
  Rows local = *sums;  // stays in registers
  for (std::size_t j = 0; j < kChunkColumns; ++j) {
#pragma GCC unroll 4
    for (std::size_t i = 0; i < kVectors; ++i) {
      Vector column;
      std::memcpy(&column, &w[j][kLanes * i], sizeof(column));
      local.part[i] += column * v[j];
    }
  }
  *sums = local;
}

// sums[t][r] += sum over the columns of one class of What[r, j] * v[t, j].
void AddClass(const BinaryMatMulClass& part, const uint8_t* codes, const uint8_t* coefficients,
              const float* v, std::size_t v_stride, std::size_t tokens, Rows (&sums)[kTileRows]) {
  float levels[kMaxLevels][kPanelRows];
  MakeLevels(coefficients + 2 * part.coefficient_slot * kPanelRows, part.planes, levels);
  codes += part.code_offset;
  for (std::size_t chunk = part.chunk_begin; chunk < part.chunk_end; ++chunk) {
    uint8_t unpacked[kChunkColumns][kPanelRows];
    UnpackChunk(codes, part.planes, unpacked);
    float w[kChunkColumns][kPanelRows];
    for (std::size_t j = 0; j < kChunkColumns; ++j) {
      for (std::size_t r = 0; r < kPanelRows; ++r) w[j][r] = levels[unpacked[j][r]][r];
    }
    for (std::size_t t = 0; t < tokens; ++t) {
      AddChunk(w, v + t * v_stride + chunk * kChunkColumns, &sums[t]);
    }
    codes += part.planes * kPlaneBlockBytes;
  }
}

void Store(const BinaryMatMulArgs& args, std::size_t row, std::size_t column, const Rows& sums) {
  const std::size_t count = std::min(kPanelRows, args.weight->n - column);
  const std::size_t offset = row * args.weight->n + column;
  if (args.type == ElementType::kFloat32) {
    std::memcpy(static_cast<float*>(args.y) + offset, &sums, count * sizeof(float));
    return;
  }
  uint16_t* y = static_cast<uint16_t*>(args.y) + offset;
  for (std::size_t r = 0; r < count; ++r) y[r] = HalfFromFloat(sums.part[r / kLanes][r % kLanes]);
}

void Multiply(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
              std::size_t panel_begin, std::size_t panel_end, const std::byte* prepared) {
  const BinaryMatMulWeight& weight = *args.weight;
  const float* v = reinterpret_cast<const float*>(prepared);
  for (std::size_t panel = panel_begin; panel < panel_end; ++panel) {
    const uint8_t* codes = weight.codes + panel * weight.panel_code_bytes;
    const uint8_t* coefficients =
        weight.coefficients + 2 * panel * weight.coefficient_slots * kPanelRows;
    for (std::size_t row = row_begin; row < row_end; row += kTileRows) {
      const std::size_t tokens = std::min(kTileRows, row_end - row);
      Rows sums[kTileRows] = {};
      for (std::size_t c = 0; c < weight.class_count; ++c) {
        AddClass(weight.classes[c], codes, coefficients, v + (row - row_begin) * weight.k_padded,
                 weight.k_padded, tokens, sums);
      }
      for (std::size_t t = 0; t < tokens; ++t) Store(args, row + t, panel * kPanelRows, sums[t]);
    }
  }
}

}  // namespace

const BinaryMatMulFunctions BinaryMatMulGeneric = {8000, RowBytes, Prepare, Multiply};

}  // namespace bivlm
