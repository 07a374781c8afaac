// BinaryMatMul of many tokens by table lookup: the wide lookup rule of OPS.md.
//
// As for a few tokens, vpermb looks up 16 rows x 4 groups at once and vpdpbusd adds up the four
// groups of a row, one row per 32-bit lane. Here a group has a fifth column, whose sign is that of
// the whole sum (the table of -s is the mirror image of that of s): vpdpbusd multiplies by the
// sign, and by the row's coefficient of the plane, in int8, so that both planes of a pair add up in
// one sum. Indices and factors are unpacked once for all tokens of a task.
#if !defined(__AVX512VBMI__) || !defined(__GFNI__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx512vbmi kernels"
#endif

#include <algorithm>
#include <cstdint>

#include "avx512/binary_matmul_avx512.h"
#include "nibbles.h"
#include "wide_lookup_rows.h"

namespace bivlm {
namespace {

constexpr std::size_t kPanels = kWideLookupUnitPanels;  // they share the tables in registers
constexpr std::size_t kTileRows = 4;                    // 16 sums in registers
constexpr std::size_t kMaxRows = 128;
constexpr std::size_t kUnitVectors = kUnitChunks * kChunkTableBytes / kTableBytes;

// Where 16 rows x 4 groups look up a table, and what their sums are multiplied by.
struct alignas(64) Lookup {
  __m512i index;
  __m512i factor;
};

// A unit of kPanels panels. Vectors are those of the tables; single planes have one plane.
struct alignas(64) Unit {
  __m512i start[kPanels];  // -128 times the sum of the factors, against the tables' 128
  Lookup lookups[kUnitVectors * 2 * kPanels];  // [vector][plane][panel]
};

struct Coefficient {
  __m512i plus[2];  // of a plane, in all bytes of a row
  __m512i minus[2];
  __m512 scale;  // of the stream
};

struct alignas(64) RowSums {
  __m512 panels[kPanels];
};

// What the tokens of a task have so far.
struct Sums {
  RowSums partial[kMaxRows];  // of the stream, without its scale
  RowSums total[kMaxRows];
};

__m512i InAllBytes(__m512i rows) {
  return _mm512_shuffle_epi8(rows, _mm512_set4_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0));
}

Coefficient MakeCoefficient(const BinaryMatMulStream& stream, const uint8_t* coefficients) {
  Coefficient result;
  const __m512 a = Coefficients(coefficients, stream.coefficient_slot);
  __m512i q[2] = {_mm512_set1_epi32(1), _mm512_setzero_si512()};
  result.scale = a;
  if (stream.is_pair) {
    const __m512 b = Coefficients(coefficients, stream.coefficient_slot + 1);
    const __m512 largest = _mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b));
    result.scale = _mm512_div_ps(largest, _mm512_set1_ps(127.0F));
    const __mmask16 nonzero = _mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    q[0] = _mm512_maskz_cvtps_epi32(nonzero, _mm512_div_ps(a, result.scale));
    q[1] = _mm512_maskz_cvtps_epi32(nonzero, _mm512_div_ps(b, result.scale));
  }
  for (std::size_t plane = 0; plane < 2; ++plane) {
    result.plus[plane] = InAllBytes(q[plane]);
    result.minus[plane] = _mm512_sub_epi8(_mm512_setzero_si512(), result.plus[plane]);
  }
  return result;
}

// vpdpbusd; written so that the compiler keeps the sum in its register.
inline void AddProducts(__m512i* sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// A nibble of 16 rows x 4 groups, and a bit of `signs` for each: 0 where the fifth sign is -.
struct Nibbles {
  __m512i index;
  __mmask64 negative;
};

// The lookup of the nibbles of one plane.
inline void StoreLookup(const Nibbles& nibbles, const Coefficient& coefficient, std::size_t plane,
                        __m512i* factor_sum, Lookup* lookup) {
  const __m512i mirrored = _mm512_xor_si512(nibbles.index, _mm512_set1_epi8(0x0F));
  lookup->index = _mm512_mask_mov_epi8(nibbles.index, nibbles.negative, mirrored);
  lookup->factor =
      _mm512_mask_mov_epi8(coefficient.plus[plane], nibbles.negative, coefficient.minus[plane]);
  AddProducts(factor_sum, _mm512_set1_epi8(static_cast<char>(0x80)), lookup->factor);
}

// Unpacks a block of units of one panel.
template <bool is_pair>
void UnpackBlock(const UnitBlock& block, const uint8_t* codes, std::size_t stride,
                 const Coefficient& coefficient, std::size_t panel, Unit* units) {
  constexpr std::size_t kPlanes = is_pair ? 2 : 1;
  constexpr std::size_t kTables = kChunkTableBytes / kTableBytes;
  const Coefficient local = coefficient;  // stays in registers
  __m512i signs[is_pair ? 4 : 2];
  for (std::size_t vector = 0; vector < (is_pair ? 4 : 2); ++vector) {
    signs[vector] = _mm512_set1_epi8(static_cast<char>(0xFF));
    if (!block.has_fifth) continue;
    const __m512i bytes = _mm512_loadu_si512(codes + block.chunks * stride + 64 * vector);
    signs[vector] = is_pair ? SplitPlanes(bytes) : bytes;
  }
  for (std::size_t chunk = 0; chunk < block.chunks; ++chunk) {
    Unit& unit = units[chunk / kUnitChunks];
    Lookup* lookups = unit.lookups + chunk % kUnitChunks * kTables * kPlanes * kPanels + panel;
    __m512i factor_sum = _mm512_setzero_si512();
    const __m512i low_bit = _mm512_set1_epi8(static_cast<char>(1U << chunk));
    const __m512i high_bit = _mm512_set1_epi8(static_cast<char>(0x10U << chunk));
#pragma GCC unroll 4
    for (std::size_t vector = 0; vector < (is_pair ? 4 : 2); ++vector) {
      const __m512i bytes = _mm512_loadu_si512(codes + 64 * vector);
      const Indices indices = NibbleIndices(is_pair ? SplitPlanes(bytes) : bytes);
      const Nibbles low = {indices.low, _mm512_testn_epi8_mask(signs[vector], low_bit)};
      const Nibbles high = {indices.high, _mm512_testn_epi8_mask(signs[vector], high_bit)};
      StoreLookup(low, local, 0, &factor_sum, lookups + 2 * vector * kPanels);
      StoreLookup(high, local, kPlanes - 1, &factor_sum, lookups + (2 * vector + 1) * kPanels);
    }
    codes += stride;
    const __m512i before = chunk % kUnitChunks == 0 ? _mm512_setzero_si512() : unit.start[panel];
    unit.start[panel] = _mm512_sub_epi32(before, factor_sum);
  }
}

// Adds a unit of one stream to the partial sums of `tokens` rows.
template <std::size_t tokens, std::size_t planes>
inline void MultiplyUnit(const Unit& unit, std::size_t vectors, const uint8_t* tables,
                         const float* scales, std::size_t row_bytes, RowSums* sums) {
  __m512i dots[tokens][kPanels];
#pragma GCC unroll 4
  for (std::size_t p = 0; p < kPanels; ++p) {
#pragma GCC unroll 4
    for (std::size_t t = 0; t < tokens; ++t) dots[t][p] = unit.start[p];
  }
  const Lookup* lookups = unit.lookups;
  for (std::size_t vector = 0; vector < vectors; ++vector) {
    __m512i table[tokens];
#pragma GCC unroll 4
    for (std::size_t t = 0; t < tokens; ++t) {
      table[t] = _mm512_load_si512(tables + t * row_bytes);
      _mm_prefetch(reinterpret_cast<const char*>(tables + (tokens + t) * row_bytes),
                   _MM_HINT_T0);  // for the next tile
    }
    tables += kTableBytes;
#pragma GCC unroll 2
    for (std::size_t plane = 0; plane < planes; ++plane) {
#pragma GCC unroll 4
      for (std::size_t p = 0; p < kPanels; ++p) {
        const __m512i index = lookups->index;
        const __m512i factor = lookups->factor;
        ++lookups;
#pragma GCC unroll 4
        for (std::size_t t = 0; t < tokens; ++t) {
          AddProducts(&dots[t][p], _mm512_permutexvar_epi8(index, table[t]), factor);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (std::size_t t = 0; t < tokens; ++t) {
    const std::byte* at = reinterpret_cast<const std::byte*>(scales) + t * row_bytes;
    const __m512 scale = _mm512_set1_ps(*reinterpret_cast<const float*>(at));
#pragma GCC unroll 4
    for (std::size_t p = 0; p < kPanels; ++p) {
      sums[t].panels[p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[t][p]), scale, sums[t].panels[p]);
    }
  }
}

// Adds a block of units of one stream to the partial sums of `tokens` rows.
template <std::size_t tokens, std::size_t planes>
void MultiplyBlock(const UnitBlock& block, const Unit* units, const WideLookupRow& first,
                   std::size_t row_bytes, RowSums* sums) {
  const uint8_t* tables = first.tables + block.table_offset;
  const float* scales = first.scale + block.unit;
  for (std::size_t chunk = 0; chunk < block.chunks; chunk += kUnitChunks) {
    const std::size_t vectors = block.chunks - chunk == 1 ? kUnitVectors / 2 : kUnitVectors;
    MultiplyUnit<tokens, planes>(*units, vectors, tables, scales, row_bytes, sums);
    tables += kTableBytes * kUnitVectors;
    ++scales;
    ++units;
  }
}

using BlockFunction = void (*)(const UnitBlock&, const Unit*, const WideLookupRow&, std::size_t,
                               RowSums*);
constexpr BlockFunction kSingle[kTileRows] = {MultiplyBlock<1, 1>, MultiplyBlock<2, 1>,
                                              MultiplyBlock<3, 1>, MultiplyBlock<4, 1>};
constexpr BlockFunction kPair[kTileRows] = {MultiplyBlock<1, 2>, MultiplyBlock<2, 2>,
                                            MultiplyBlock<3, 2>, MultiplyBlock<4, 2>};

// The blocks of all streams of a weight, one after the other.
class Blocks {
 public:
  explicit Blocks(const BinaryMatMulWeight& weight)
      : weight_(weight), block_(FirstBlock(weight, 0)) {}

  bool is_valid() const { return stream_ < weight_.stream_count; }
  std::size_t stream() const { return stream_; }
  const UnitBlock& block() const { return block_; }

  // Where the codes of the block are in a panel.
  std::size_t code_offset() const {
    const BinaryMatMulStream& stream = weight_.streams[stream_];
    return stream.code_offset + (block_.chunk - stream.chunk_begin) * stream.code_stride;
  }

  void Next() {
    block_ = NextBlock(block_, weight_.streams[stream_].chunk_end);
    if (block_.chunks > 0) return;
    ++stream_;
    if (!is_valid()) return;
    while (weight_.classes[class_].chunk_end != weight_.streams[stream_].chunk_end) ++class_;
    block_ = FirstBlock(weight_, class_);
  }

 private:
  const BinaryMatMulWeight& weight_;
  std::size_t stream_ = 0;
  std::size_t class_ = 0;
  UnitBlock block_;
};

void PrefetchBlock(const BinaryMatMulStream& stream, const UnitBlock& block, const uint8_t* codes) {
  const std::size_t bytes = (stream.is_pair ? 2 : 1) * kPlaneBlockBytes;
  const std::size_t chunks = block.chunks + (block.has_fifth ? 1 : 0);
  for (std::size_t chunk = 0; chunk < chunks; ++chunk, codes += stream.code_stride) {
    for (std::size_t line = 0; line < bytes; line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + line), _MM_HINT_T0);
    }
  }
}

// y is far apart from row to row: without this, each line waits for the cache when it is written.
void PrefetchOutputs(const BinaryMatMulArgs& args, std::size_t row, std::size_t count,
                     std::size_t column, std::size_t columns) {
  const std::size_t size = args.type == ElementType::kFloat32 ? 4 : 2;
  for (std::size_t i = 0; i < count; ++i) {
    const char* y = static_cast<const char*>(args.y) + size * ((row + i) * args.weight->n + column);
    for (std::size_t byte = 0; byte < columns * size; byte += 64) __builtin_prefetch(y + byte, 1);
  }
}

// The product of rows [row, row + rows) with at most kPanels panels.
void MultiplyPanels(const BinaryMatMulArgs& args, std::size_t row, std::size_t rows,
                    std::size_t panel, std::size_t panels, std::byte* prepared, Sums* sums) {
  const BinaryMatMulWeight& weight = *args.weight;
  const std::size_t row_bytes = WideLookupRowBytes(weight);
  const std::size_t tiles = (rows + kTileRows - 1) / kTileRows;
  const WideLookupRow first = WideLookupRowAt(weight, prepared);
  Coefficient coefficients[kPanels];
  Unit units[kBlockUnits];
  std::size_t last_stream = weight.stream_count;
  for (Blocks blocks(weight); blocks.is_valid();) {
    const std::size_t s = blocks.stream();
    const BinaryMatMulStream& stream = weight.streams[s];
    const UnitBlock block = blocks.block();
    const bool starts_stream = s != last_stream;
    for (std::size_t p = 0; p < kPanels; ++p) {
      // Panels that do not exist repeat the last one; their sums are not stored.
      const std::size_t index = panel + std::min(p, panels - 1);
      if (starts_stream) {
        coefficients[p] = MakeCoefficient(
            stream, weight.coefficients + 2 * index * weight.coefficient_slots * kPanelRows);
      }
      const auto unpack = stream.is_pair ? UnpackBlock<true> : UnpackBlock<false>;
      unpack(block, weight.codes + index * weight.panel_code_bytes + blocks.code_offset(),
             stream.code_stride, coefficients[p], p, units);
    }
    last_stream = s;
    blocks.Next();
    const bool ends_stream = !blocks.is_valid() || blocks.stream() != s;
    const bool ends_weight = !blocks.is_valid();
    const Blocks next = ends_weight ? Blocks(weight) : blocks;
    for (std::size_t p = 0; p < kPanels; ++p) {
      const std::size_t index = panel + p + (ends_weight ? kPanels : 0);
      if (index >= weight.panels) break;
      PrefetchBlock(weight.streams[next.stream()], next.block(),
                    weight.codes + index * weight.panel_code_bytes + next.code_offset());
    }
    for (std::size_t tile = 0; tile < tiles; ++tile) {
      const std::size_t begin = rows * tile / tiles;
      const std::size_t count = rows * (tile + 1) / tiles - begin;
      RowSums* partial = sums->partial + begin;
      if (ends_weight) {
        PrefetchOutputs(args, row + begin, count, panel * kPanelRows, panels * kPanelRows);
      }
      if (starts_stream) std::fill(partial, partial + count, RowSums());
      const WideLookupRow at = {
          first.tables + begin * row_bytes,
          reinterpret_cast<float*>(reinterpret_cast<std::byte*>(first.scale) + begin * row_bytes)};
      (stream.is_pair ? kPair : kSingle)[count - 1](block, units, at, row_bytes, partial);
      if (!ends_stream) continue;
      for (std::size_t i = 0; i < count; ++i) {
        RowSums& total = sums->total[begin + i];
        for (std::size_t p = 0; p < panels; ++p) {
          const __m512 before = s == 0 ? _mm512_setzero_ps() : total.panels[p];
          total.panels[p] = _mm512_fmadd_ps(partial[i].panels[p], coefficients[p].scale, before);
          if (ends_weight) {
            Store(args, row + begin + i, (panel + p) * kPanelRows, total.panels[p]);
          }
        }
      }
    }
  }
}

}  // namespace

void MultiplyWideLookup(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                        std::size_t panel_begin, std::size_t panel_end, const std::byte* prepared) {
  std::byte* rows = const_cast<std::byte*>(prepared);
  Sums sums;
  for (std::size_t row = row_begin; row < row_end; row += kMaxRows) {
    const std::size_t count = std::min(kMaxRows, row_end - row);
    for (std::size_t p = panel_begin; p < panel_end; p += kPanels) {
      MultiplyPanels(args, row, count, p, std::min(kPanels, panel_end - p), rows, &sums);
    }
    rows += count * WideLookupRowBytes(*args.weight);
  }
}

}  // namespace bivlm
