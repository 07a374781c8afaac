// Rows of activations as the lookup kernel for many tokens reads them: the wide lookup rule of
// OPS.md.
//
// Every class is divided into units of at most two chunks that are looked up; five chunks in a row
// give two units, and the fifth of them adds a fifth column to each of their groups. A prepared row
// holds, one after the other:
//   uint8 tables[..]    unit by unit, for every 16 columns that are looked up 64 bytes: byte
//                       16 e + c is 128 plus the sum of columns 4 i + e, i = 0..3, in units of the
//                       unit's scale and rounded, each with the sign + where bit i of c is 1, else
//                       -, and of the fifth column
//   float scale[units]  0 where all sums are 0; NaN everywhere for a token with a NaN or an
//                       infinity
//
// The functions are static for the reason given in bivlm/float16.h.
#ifndef BIVLM_CPU_AVX512VBMI_WIDE_LOOKUP_ROWS_H_
#define BIVLM_CPU_AVX512VBMI_WIDE_LOOKUP_ROWS_H_

#include <cstddef>
#include <cstdint>

#include "lookup_rows.h"

namespace bivlm {

inline constexpr std::size_t kRunChunks = 5;   // of two units with fifth columns
inline constexpr std::size_t kUnitChunks = 2;  // that are looked up
inline constexpr std::size_t kBlockUnits = 2;  // of a run, or of the chunks left over
inline constexpr std::size_t kLookedUpChunks = kUnitChunks * kBlockUnits;

// The chunks of a class, or of one of its streams, in blocks of two units: runs of five chunks,
// then what is left, up to four.
struct UnitBlock {
  std::size_t chunk;   // its first
  std::size_t chunks;  // that are looked up
  bool has_fifth;
  std::size_t table_offset;  // of a row
  std::size_t unit;

  std::size_t units() const { return (chunks + kUnitChunks - 1) / kUnitChunks; }
};

// The first block of a class.
static inline UnitBlock FirstBlock(const BinaryMatMulWeight& weight, std::size_t index) {
  UnitBlock block = {};
  for (std::size_t i = 0; i < index; ++i) {
    const BinaryMatMulClass& c = weight.classes[i];
    const std::size_t runs = (c.chunk_end - c.chunk_begin) / kRunChunks;
    const std::size_t left = (c.chunk_end - c.chunk_begin) % kRunChunks;
    block.table_offset += (runs * kLookedUpChunks + left) * kChunkTableBytes;
    block.unit += runs * kBlockUnits + (left + kUnitChunks - 1) / kUnitChunks;
  }
  if (index == weight.class_count) return block;
  const BinaryMatMulClass& c = weight.classes[index];
  block.chunk = c.chunk_begin;
  block.has_fifth = c.chunk_end - c.chunk_begin >= kRunChunks;
  block.chunks = block.has_fifth ? kLookedUpChunks : c.chunk_end - c.chunk_begin;
  return block;
}

// The block behind `block` in a class that ends at chunk_end; its `chunks` are 0 at the end.
static inline UnitBlock NextBlock(const UnitBlock& block, std::size_t chunk_end) {
  UnitBlock next = block;
  next.chunk += block.chunks + (block.has_fifth ? 1 : 0);
  next.table_offset += block.chunks * kChunkTableBytes;
  next.unit += block.units();
  next.has_fifth = chunk_end - next.chunk >= kRunChunks;
  next.chunks = next.has_fifth ? kLookedUpChunks : chunk_end - next.chunk;
  return next;
}

struct WideLookupRow {
  uint8_t* tables;
  float* scale;
};

static inline std::size_t WideLookupRowBytes(const BinaryMatMulWeight& weight) {
  const UnitBlock end = FirstBlock(weight, weight.class_count);
  const std::size_t bytes = end.table_offset + sizeof(float) * end.unit;
  const std::size_t rounded = (bytes + 63) / 64 * 64;
  // Rows a multiple of 4096 bytes apart would compete for the same lines of the L1 cache.
  return rounded % 4096 == 0 ? rounded + 64 : rounded;
}

static inline WideLookupRow WideLookupRowAt(const BinaryMatMulWeight& weight, std::byte* row) {
  uint8_t* tables = reinterpret_cast<uint8_t*>(row);
  const std::size_t bytes = FirstBlock(weight, weight.class_count).table_offset;
  return {tables, reinterpret_cast<float*>(tables + bytes)};
}

// BinaryMatMulFunctions::unit_panels, prepare and multiply of the wide lookup rule.
inline constexpr std::size_t kWideLookupUnitPanels = 4;
void PrepareWideLookup(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                       std::byte* prepared, float* work);
void MultiplyWideLookup(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                        std::size_t panel_begin, std::size_t panel_end, const std::byte* prepared);

}  // namespace bivlm

#endif  // BIVLM_CPU_AVX512VBMI_WIDE_LOOKUP_ROWS_H_
