// The transform of activations and the tables of their sums.
#include <algorithm>
#include <cfloat>
#include <limits>

#include "avx512/transform_avx512.h"
#include "lookup_rows.h"

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

// The table of 16 columns, in units of the scale.
__m512i MakeTable(__m512 v) {
  const __m512 one = _mm512_set1_ps(1.0F);
  const __m512 v0 = _mm512_shuffle_f32x4(v, v, 0x00);
  const __m512 v1 = _mm512_shuffle_f32x4(v, v, 0x55);
  const __m512 v2 = _mm512_shuffle_f32x4(v, v, 0xAA);
  const __m512 v3 = _mm512_shuffle_f32x4(v, v, 0xFF);
  // c = 0..3 in the quarters, then 4..7; 15 - c is the negative of c.
  const __m512 first = _mm512_mask_sub_ps(v0, 0x0F0F, _mm512_setzero_ps(), v0);
  const __m512 low =
      _mm512_fmadd_ps(v1, _mm512_mask_sub_ps(one, 0x00FF, _mm512_setzero_ps(), one), first);
  const __m512i below_4 = _mm512_cvtps_epi32(_mm512_sub_ps(low, _mm512_add_ps(v2, v3)));
  const __m512i below_8 = _mm512_cvtps_epi32(_mm512_add_ps(low, _mm512_sub_ps(v2, v3)));
  const __m512i words = _mm512_packs_epi32(below_4, below_8);
  const __m512i bytes = _mm512_packs_epi16(words, _mm512_sub_epi16(_mm512_setzero_si512(), words));
  return _mm512_permutexvar_epi8(_mm512_load_si512(kTableOrder.bytes), bytes);
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
  largest_bits = _mm512_max_epi32(
      largest_bits, _mm512_shuffle_epi32(largest_bits, static_cast<_MM_PERM_ENUM>(0xB1)));
  largest_bits = _mm512_max_epi32(
      largest_bits, _mm512_shuffle_epi32(largest_bits, static_cast<_MM_PERM_ENUM>(0x4E)));
  const __mmask16 finite = _mm512_cmplt_epi32_mask(largest_bits, _mm512_set1_epi32(kInfinityBits));
  const __m512 scale = _mm512_div_ps(_mm512_castsi512_ps(largest_bits), _mm512_set1_ps(31.75F));
  const __mmask16 normal =
      _mm512_mask_cmp_ps_mask(finite, scale, _mm512_set1_ps(FLT_MIN), _CMP_GE_OQ);
  const __m512 inverse = _mm512_maskz_div_ps(normal, _mm512_set1_ps(1.0F), scale);
  int8_t* tables = row.tables + chunk * kChunkTableBytes;
  for (std::size_t t = 0; t < kTables; ++t) {
    _mm512_store_si512(tables + t * kTableBytes, MakeTable(_mm512_mul_ps(v[t], inverse)));
  }
  row.scale[chunk] = _mm512_cvtss_f32(_mm512_maskz_mov_ps(normal, scale));
  return finite != 0;
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

}  // namespace bivlm
