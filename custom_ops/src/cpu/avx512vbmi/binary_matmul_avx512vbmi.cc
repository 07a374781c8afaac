// BinaryMatMul of a few tokens by table lookup.
//
// The bits of one plane for columns 4 i + e, i = 0..3, of a row choose one of 16 sums of the four
// activations. vpermb looks up 16 rows x 4 values of e at once, vpdpbusd with ones adds up the four
// e of a row, one row per 32-bit lane.
#if !defined(__AVX512VBMI__) || !defined(__GFNI__)
#error "compile this file with the flags that CMakeLists.txt gives to the avx512vbmi kernels"
#endif

#include <cstdint>

#include "avx512/binary_matmul_avx512.h"
#include "lookup_rows.h"
#include "nibbles.h"
#include "wide_lookup_rows.h"

namespace bivlm {
namespace {

constexpr std::size_t kPrefetchPanels = 4;

// One line is touched in every page; two in every KiB took 3 % longer.
constexpr std::size_t kTouchStep = 4096;

// Panels that are multiplied together share the tables in registers. With one token and k = 4096,
// two panels, or a longer lead, would drive the tables out of the L1 cache.
constexpr std::size_t PanelsOf(std::size_t tokens) { return tokens == 1 ? 1 : 2; }

template <bool through_l2, std::size_t bytes>
void PrefetchCodes(const uint8_t** next) {
  PrefetchLines<through_l2, bytes>(*next);
  if (reinterpret_cast<std::uintptr_t>(*next) % kTouchStep < bytes) {
    _mm_prefetch(reinterpret_cast<const char*>(*next + kTouchBytes), _MM_HINT_T1);
  }
  *next += bytes;
}

inline __m512i AddLookup(__m512i sum, __m512i index, __m512i table) {
  return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_permutexvar_epi8(index, table));
}

// Adds a stream of What * v to sums.
template <bool through_l2, std::size_t tokens, std::size_t panels, bool is_pair>
void AddStream(const BinaryMatMulWeight& weight, const BinaryMatMulStream& stream,
               std::size_t panel, const LookupRow (&rows)[tokens], const uint8_t** prefetch,
               __m512 (&sums)[panels][tokens]) {
  constexpr std::size_t kPlanes = is_pair ? 2 : 1;
  constexpr std::size_t kVectors = kPlanes * 2;
  const uint8_t* codes[panels];
  __m512 partial[panels][tokens][kPlanes];
#pragma GCC unroll 2
  for (std::size_t p = 0; p < panels; ++p) {
    codes[p] = weight.codes + (panel + p) * weight.panel_code_bytes + stream.code_offset;
#pragma GCC unroll 4
    for (std::size_t t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
      for (std::size_t plane = 0; plane < kPlanes; ++plane) {
        partial[p][t][plane] = _mm512_setzero_ps();
      }
    }
  }
  const uint8_t* next = *prefetch;
  for (std::size_t chunk = stream.chunk_begin; chunk < stream.chunk_end; ++chunk) {
    PrefetchCodes<through_l2, panels * kPlanes * kPlaneBlockBytes>(&next);
    __m512i dots[panels][tokens][kPlanes];
#pragma GCC unroll 2
    for (std::size_t p = 0; p < panels; ++p) {
#pragma GCC unroll 4
      for (std::size_t t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
        for (std::size_t plane = 0; plane < kPlanes; ++plane) {
          dots[p][t][plane] = _mm512_setzero_si512();
        }
      }
    }
#pragma GCC unroll 4
    for (std::size_t vector = 0; vector < kVectors; ++vector) {
      Indices indices[panels];
#pragma GCC unroll 2
      for (std::size_t p = 0; p < panels; ++p) {
        const __m512i bytes = _mm512_loadu_si512(codes[p] + 64 * vector);
        indices[p] = NibbleIndices(is_pair ? SplitPlanes(bytes) : bytes);
      }
#pragma GCC unroll 4
      for (std::size_t t = 0; t < tokens; ++t) {
        const int8_t* tables = rows[t].tables + chunk * kChunkTableBytes;
        const std::size_t low = is_pair ? vector : 2 * vector;
        const std::size_t high = is_pair ? vector : 2 * vector + 1;
        const __m512i low_table = _mm512_load_si512(tables + kTableBytes * low);
        const __m512i high_table = _mm512_load_si512(tables + kTableBytes * high);
#pragma GCC unroll 2
        for (std::size_t p = 0; p < panels; ++p) {
          __m512i(&planes)[kPlanes] = dots[p][t];
          planes[0] = AddLookup(planes[0], indices[p].low, low_table);
          planes[kPlanes - 1] = AddLookup(planes[kPlanes - 1], indices[p].high, high_table);
        }
      }
    }
#pragma GCC unroll 4
    for (std::size_t t = 0; t < tokens; ++t) {
      const __m512 scale = _mm512_set1_ps(rows[t].scale[chunk]);
#pragma GCC unroll 2
      for (std::size_t p = 0; p < panels; ++p) {
#pragma GCC unroll 2
        for (std::size_t plane = 0; plane < kPlanes; ++plane) {
          partial[p][t][plane] =
              _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[p][t][plane]), scale, partial[p][t][plane]);
        }
      }
    }
#pragma GCC unroll 2
    for (std::size_t p = 0; p < panels; ++p) codes[p] += stream.code_stride;
  }
  *prefetch = next;
#pragma GCC unroll 2
  for (std::size_t p = 0; p < panels; ++p) {
    const uint8_t* coefficients =
        weight.coefficients + 2 * (panel + p) * weight.coefficient_slots * kPanelRows;
#pragma GCC unroll 2
    for (std::size_t plane = 0; plane < kPlanes; ++plane) {
      const __m512 alpha = Coefficients(coefficients, stream.coefficient_slot + plane);
#pragma GCC unroll 4
      for (std::size_t t = 0; t < tokens; ++t) {
        sums[p][t] = _mm512_fmadd_ps(partial[p][t][plane], alpha, sums[p][t]);
      }
    }
  }
}

void PrefetchCoefficients(const BinaryMatMulWeight& weight, std::size_t panel) {
  if (panel >= weight.panels) return;
  const std::size_t bytes = 2 * weight.coefficient_slots * kPanelRows;
  const uint8_t* coefficients = weight.coefficients + panel * bytes;
  for (std::size_t line = 0; line < bytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(coefficients + line), _MM_HINT_T0);
  }
}

template <bool through_l2, std::size_t tokens, std::size_t panels>
void MultiplyPanels(const BinaryMatMulArgs& args, std::size_t row, const LookupRow (&rows)[tokens],
                    std::size_t panel) {
  const BinaryMatMulWeight& weight = *args.weight;
  __m512 sums[panels][tokens] = {};
  // The codes of the last panel must be there when its first is multiplied.
  const uint8_t* prefetch =
      weight.codes + (panel + panels - 1) * weight.panel_code_bytes + kPrefetchBytes;
  for (std::size_t p = 0; p < panels; ++p) {
    PrefetchCoefficients(weight, panel + p + kPrefetchPanels);
  }
  for (std::size_t s = 0; s < weight.stream_count; ++s) {
    if (weight.streams[s].is_pair) {
      AddStream<through_l2, tokens, panels, true>(weight, weight.streams[s], panel, rows, &prefetch,
                                                  sums);
    } else {
      AddStream<through_l2, tokens, panels, false>(weight, weight.streams[s], panel, rows,
                                                   &prefetch, sums);
    }
  }
  for (std::size_t p = 0; p < panels; ++p) {
    for (std::size_t t = 0; t < tokens; ++t) {
      Store(args, row + t, (panel + p) * kPanelRows, sums[p][t]);
    }
  }
}

template <bool through_l2, std::size_t tokens>
void MultiplyTile(const BinaryMatMulArgs& args, std::size_t row, std::size_t panel_begin,
                  std::size_t panel_end, std::byte* prepared) {
  const BinaryMatMulWeight& weight = *args.weight;
  LookupRow rows[tokens];
  for (std::size_t t = 0; t < tokens; ++t) {
    rows[t] = LookupRowAt(weight, prepared + t * LookupRowBytes(weight));
  }
  constexpr std::size_t kPanels = PanelsOf(tokens);
  std::size_t panel = panel_begin;
  for (; panel + kPanels <= panel_end; panel += kPanels) {
    MultiplyPanels<through_l2, tokens, kPanels>(args, row, rows, panel);
  }
  if (panel < panel_end) MultiplyPanels<through_l2, tokens, 1>(args, row, rows, panel);
}

using TileFunction = void (*)(const BinaryMatMulArgs&, std::size_t, std::size_t, std::size_t,
                              std::byte*);
template <bool through_l2>
constexpr TileFunction kTiles[kMaxLookupTokens] = {
    MultiplyTile<through_l2, 1>, MultiplyTile<through_l2, 2>, MultiplyTile<through_l2, 3>,
    MultiplyTile<through_l2, 4>};

void MultiplyByLookup(const BinaryMatMulArgs& args, std::size_t row_begin, std::size_t row_end,
                      std::size_t panel_begin, std::size_t panel_end, const std::byte* prepared) {
  const std::size_t tile = row_end - row_begin - 1;
  const TileFunction multiply = HasSmallL1() ? kTiles<true>[tile] : kTiles<false>[tile];
  multiply(args, row_begin, panel_begin, panel_end, const_cast<std::byte*>(prepared));
}

}  // namespace

const BinaryMatMulFunctions BinaryMatMulLookup = {1U << 19, LookupRowBytes, PrepareLookup,
                                                  MultiplyByLookup};

const BinaryMatMulFunctions BinaryMatMulAvx512Vbmi = {
    1U << 19,         WideLookupRowBytes,  PrepareWideLookup,    MultiplyWideLookup,
    kMaxLookupTokens, &BinaryMatMulLookup, kWideLookupUnitPanels};

}  // namespace bivlm
