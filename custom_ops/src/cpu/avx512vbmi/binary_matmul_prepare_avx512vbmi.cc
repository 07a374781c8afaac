// The transform of activations and the tables of their sums.
#include <algorithm>
#include <cfloat>
#include <limits>

#include "avx512/transform_avx512.h"
#include "lookup_rows.h"
#include "wide_lookup_rows.h"

namespace bivlm {
namespace {

constexpr int kInfinityBits = 0x7f800000;
constexpr std::size_t kTables = kChunkColumns / kTableColumns;
static_assert(kTableColumns == kLanes, "a table belongs to a vector");

// Where byte 16 e + c of a table is after packing: see MakeTable.
struct alignas(64) TableOrder {
  uint8_t bytes[kTableBytes];
};
constexpr TableOrder MakeTableOrder() {
  TableOrder order{};
  for (unsigned e = 0; e < 4; ++e) {
    for (unsigned c = 0; c < 16; ++c) {
      const unsigned half = c < 8 ? c : 15 - c;
      order.bytes[16 * e + c] =
          static_cast<uint8_t>(16 * (half % 4) + (c < 8 ? 0 : 8) + 4 * (half / 4) + e);
    }
  }
  return order;
}
constexpr TableOrder kTableOrder = MakeTableOrder();

// In each 128-bit quarter the largest sum of four, in all its elements: columns 4 i + e of a vector
// lie in quarter i.
__m512 GroupSums(__m512 v) {
  const __m512 pairs = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xB1));
  return _mm512_add_ps(pairs, _mm512_shuffle_f32x4(pairs, pairs, 0x4E));
}

// The sums of 16 columns, in units of the scale, for c = 0..3 in the quarters of the first vector
// and 4..7 in those of the second; the sum of 15 - c is the negative of that of c.
struct HalfTable {
  __m512 below_4;
  __m512 below_8;
};

HalfTable MakeHalfTable(__m512 v) {
  const __m512 one = _mm512_set1_ps(1.0F);
  const __m512 v0 = _mm512_shuffle_f32x4(v, v, 0x00);
  const __m512 v1 = _mm512_shuffle_f32x4(v, v, 0x55);
  const __m512 v2 = _mm512_shuffle_f32x4(v, v, 0xAA);
  const __m512 v3 = _mm512_shuffle_f32x4(v, v, 0xFF);
  const __m512 first = _mm512_mask_sub_ps(v0, 0x0F0F, _mm512_setzero_ps(), v0);
  const __m512 low =
      _mm512_fmadd_ps(v1, _mm512_mask_sub_ps(one, 0x00FF, _mm512_setzero_ps(), one), first);
  return {_mm512_sub_ps(low, _mm512_add_ps(v2, v3)), _mm512_add_ps(low, _mm512_sub_ps(v2, v3))};
}

// The table of sums in 16 bits: those of c < 8 and their mirror images.
__m512i PackTable(__m512i words, __m512i mirrored) {
  return _mm512_permutexvar_epi8(_mm512_load_si512(kTableOrder.bytes),
                                 _mm512_packs_epi16(words, mirrored));
}

// The table of 16 columns.
__m512i MakeTable(__m512 v) {
  const HalfTable half = MakeHalfTable(v);
  const __m512i words =
      _mm512_packs_epi32(_mm512_cvtps_epi32(half.below_4), _mm512_cvtps_epi32(half.below_8));
  return PackTable(words, _mm512_sub_epi16(_mm512_setzero_si512(), words));
}

// The same with a fifth column in each group, whose sign is +; quarters of `fifth` are equal.
__m512i MakeWideTable(__m512 v, __m512 fifth) {
  const HalfTable half = MakeHalfTable(v);
  const __m512i words = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_add_ps(half.below_4, fifth)),
                                           _mm512_cvtps_epi32(_mm512_add_ps(half.below_8, fifth)));
  const __m512i mirrored =
      _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_sub_ps(fifth, half.below_4)),
                         _mm512_cvtps_epi32(_mm512_sub_ps(fifth, half.below_8)));
  return PackTable(words, mirrored);
}

// The largest element, in all elements that count: lane e of every quarter is the same.
__m512i LargestOfFour(__m512i v) {
  v = _mm512_max_epi32(v, _mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(0xB1)));
  return _mm512_max_epi32(v, _mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(0x4E)));
}

struct Scale {
  __m512 value;    // 0 where it is too small
  __m512 inverse;  // 0 there
  bool is_finite;
};

// The scale whose sums are at most 127, from the bits of the largest part of a sum: 127 / divisor.
Scale MakeScale(__m512i largest_bits, float divisor) {
  const __mmask16 finite = _mm512_cmplt_epi32_mask(largest_bits, _mm512_set1_epi32(kInfinityBits));
  const __m512 scale = _mm512_div_ps(_mm512_castsi512_ps(largest_bits), _mm512_set1_ps(divisor));
  const __mmask16 normal =
      _mm512_mask_cmp_ps_mask(finite, scale, _mm512_set1_ps(FLT_MIN), _CMP_GE_OQ);
  return {_mm512_maskz_mov_ps(normal, scale),
          _mm512_maskz_div_ps(normal, _mm512_set1_ps(1.0F), scale), finite != 0};
}

// Writes the tables of one chunk of v. Returns whether it is finite.
bool MakeTables(const BinaryMatMulWeight& weight, const float* u, std::size_t chunk,
                const LookupRow& row) {
  __m512 v[kTables];
  __m512i largest_bits = _mm512_setzero_si512();
  for (std::size_t t = 0; t < kTables; ++t) {
    v[t] = Ordered(weight, u, chunk * kChunkColumns + t * kLanes);
    // A quarter of each, so that sums of finite values are finite.
    const __m512 quarter = _mm512_mul_ps(_mm512_abs_ps(v[t]), _mm512_set1_ps(0.25F));
    largest_bits = _mm512_max_epi32(largest_bits, _mm512_castps_si512(GroupSums(quarter)));
  }
  const Scale scale = MakeScale(LargestOfFour(largest_bits), 31.75F);
  int8_t* tables = row.tables + chunk * kChunkTableBytes;
  for (std::size_t t = 0; t < kTables; ++t) {
    _mm512_store_si512(tables + t * kTableBytes, MakeTable(_mm512_mul_ps(v[t], scale.inverse)));
  }
  row.scale[chunk] = _mm512_cvtss_f32(scale.value);
  return scale.is_finite;
}

// The fifth columns of a vector whose quarters are those of the chunks of a run.
__m512 FifthColumns(__m512 v, std::size_t quarter) {
  const __m512i lanes = _mm512_add_epi32(_mm512_set4_epi32(3, 2, 1, 0),
                                         _mm512_set1_epi32(static_cast<int>(4 * quarter)));
  return _mm512_permutexvar_ps(lanes, v);
}

// Writes the tables of a unit: of `chunks` chunks from `chunk` on, which are those from number
// `position` on of a run whose fifth chunk is given, unless that is null. Returns whether they are
// finite.
bool MakeWideTables(const BinaryMatMulWeight& weight, const float* u, std::size_t chunk,
                    std::size_t chunks, const __m512* fifth_chunk, std::size_t position,
                    uint8_t* tables, float* scale_at) {
  const __m512 eighth = _mm512_set1_ps(0.125F);  // so that sums of finite values are finite
  const auto fifth = [=](std::size_t t, __m512 factor) {
    if (fifth_chunk == nullptr) return _mm512_setzero_ps();
    // Multiplied first: as the last step it could become one with a sum.
    return FifthColumns(_mm512_mul_ps(fifth_chunk[t % kTables], factor), position + t / kTables);
  };
  __m512 v[kUnitChunks * kTables];
  __m512i largest_bits = _mm512_setzero_si512();
  for (std::size_t t = 0; t < chunks * kTables; ++t) {
    v[t] = Ordered(weight, u, chunk * kChunkColumns + t * kLanes);
    const __m512 sum = _mm512_add_ps(GroupSums(_mm512_mul_ps(_mm512_abs_ps(v[t]), eighth)),
                                     _mm512_abs_ps(fifth(t, eighth)));
    largest_bits = _mm512_max_epi32(largest_bits, _mm512_castps_si512(sum));
  }
  const Scale scale = MakeScale(LargestOfFour(largest_bits), 15.875F);
  const __m512i bias = _mm512_set1_epi8(static_cast<char>(0x80));
  for (std::size_t t = 0; t < chunks * kTables; ++t) {
    const __m512i table =
        MakeWideTable(_mm512_mul_ps(v[t], scale.inverse), fifth(t, scale.inverse));
    _mm512_store_si512(tables + t * kTableBytes, _mm512_xor_si512(table, bias));
  }
  *scale_at = _mm512_cvtss_f32(scale.value);
  return scale.is_finite;
}

// The same for a block of units.
bool MakeBlockTables(const BinaryMatMulWeight& weight, const float* u, const UnitBlock& block,
                     const WideLookupRow& row) {
  __m512 fifth[kTables];
  for (std::size_t t = 0; block.has_fifth && t < kTables; ++t) {
    fifth[t] = Ordered(weight, u, (block.chunk + block.chunks) * kChunkColumns + t * kLanes);
  }
  bool is_finite = true;
  for (std::size_t unit = 0; unit < block.units(); ++unit) {
    const std::size_t first = unit * kUnitChunks;
    const std::size_t chunks = std::min(kUnitChunks, block.chunks - first);
    const bool unit_is_finite = MakeWideTables(
        weight, u, block.chunk + first, chunks, block.has_fifth ? fifth : nullptr, first,
        row.tables + block.table_offset + first * kChunkTableBytes, row.scale + block.unit + unit);
    is_finite = is_finite && unit_is_finite;
  }
  return is_finite;
}

}  // namespace

void PrepareLookup(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                   std::byte* prepared, float* work) {
  const BinaryMatMulWeight& weight = *args.weight;
  for (std::size_t r = row_begin; r < row_end; ++r, prepared += LookupRowBytes(weight)) {
    const LookupRow row = LookupRowAt(weight, prepared);
    LoadRow(args, r, work);
    if (weight.hadamard_block > 0) SignedHadamard(weight, work);
    bool is_finite = true;
    for (std::size_t chunk = 0; chunk < weight.chunks(); ++chunk) {
      is_finite = MakeTables(weight, work, chunk, row) && is_finite;
    }
    if (is_finite) continue;
    std::fill(row.scale, row.scale + weight.chunks(), std::numeric_limits<float>::quiet_NaN());
  }
}

void PrepareWideLookup(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                       std::byte* prepared, float* work) {
  const BinaryMatMulWeight& weight = *args.weight;
  const std::size_t units = FirstBlock(weight, weight.class_count).unit;
  for (std::size_t r = row_begin; r < row_end; ++r, prepared += WideLookupRowBytes(weight)) {
    const WideLookupRow row = WideLookupRowAt(weight, prepared);
    LoadRow(args, r, work);
    if (weight.hadamard_block > 0) SignedHadamard(weight, work);
    bool is_finite = true;
    for (std::size_t c = 0; c < weight.class_count; ++c) {
      const std::size_t chunk_end = weight.classes[c].chunk_end;
      UnitBlock block = FirstBlock(weight, c);
      for (; block.chunks > 0; block = NextBlock(block, chunk_end)) {
        is_finite = MakeBlockTables(weight, work, block, row) && is_finite;
      }
    }
    if (is_finite) continue;
    std::fill(row.scale, row.scale + units, std::numeric_limits<float>::quiet_NaN());
  }
}

}  // namespace bivlm
