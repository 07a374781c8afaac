// The instructions of AMX that the kernels use, with the numbers of the tile registers as template
// arguments, which the compilers' own intrinsics do not take. tests/emulated/amx/tiles.h is the
// same in plain C++, for CPUs without AMX.
//
// Reference: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
// The functions are static for the reason given in bivlm/float16.h.
#ifndef BIVLM_CPU_AMX_TILES_H_
#define BIVLM_CPU_AMX_TILES_H_

#include <cstddef>
#include <cstdint>

namespace bivlm {

// Rows and bytes per row of the eight tile registers, as ldtilecfg reads them.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// Of this thread, until ReleaseTiles.
static inline void LoadTileConfig(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config));
}

static inline void ReleaseTiles() { asm volatile("tilerelease"); }

template <int tile>
static inline void ZeroTile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// `stride` bytes from a row to the next.
template <int tile>
static inline void LoadTile(const void* base, std::size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(base), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
static inline void StoreTile(void* base, std::size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(base), "r"(stride), "i"(tile) : "memory");
}

// int32 c[m][n] += sum over k and i < 4 of int8 a[m][4 k + i] * int8 b[k][4 n + i]
template <int c, int a, int b>
static inline void AddTileProduct() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

}  // namespace bivlm

#endif  // BIVLM_CPU_AMX_TILES_H_
