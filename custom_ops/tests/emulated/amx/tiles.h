// src/cpu/amx/tiles.h in plain C++. Aborts where the CPU would raise an exception, and where a
// thread that still holds tiles is given new ones: a task must leave none behind.
#ifndef BIVLM_CPU_AMX_TILES_H_
#define BIVLM_CPU_AMX_TILES_H_

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace bivlm {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

struct EmulatedTiles {
  bool is_configured = false;
  TileConfig config;
  uint8_t bytes[8][16][64];
};

inline thread_local EmulatedTiles emulated_tiles;

static inline void RequireTile(bool holds, const char* text) {
  if (holds) return;
  std::fprintf(stderr, "emulated AMX: %s\n", text);
  std::abort();
}

static inline void LoadTileConfig(const TileConfig& config) {
  EmulatedTiles& tiles = emulated_tiles;
  RequireTile(!tiles.is_configured, "this thread has tiles of an earlier task");
  RequireTile(config.palette == 1 && config.start_row == 0, "palette or start row");
  for (const uint8_t byte : config.reserved) RequireTile(byte == 0, "reserved byte is not 0");
  for (int i = 0; i < 16; ++i) {
    RequireTile(config.rows[i] <= 16 && config.row_bytes[i] <= 64, "tile too large");
    RequireTile((config.rows[i] == 0) == (config.row_bytes[i] == 0), "tile with half a size");
    RequireTile(i < 8 || config.rows[i] == 0, "palette 1 has eight tiles");
  }
  tiles.is_configured = true;
  tiles.config = config;
  std::memset(tiles.bytes, 0, sizeof(tiles.bytes));
}

static inline void ReleaseTiles() { emulated_tiles.is_configured = false; }

static inline void RequireConfigured(int tile) {
  RequireTile(emulated_tiles.is_configured && emulated_tiles.config.rows[tile] > 0,
              "tile is not configured");
}

template <int tile>
static inline void ZeroTile() {
  RequireConfigured(tile);
  std::memset(emulated_tiles.bytes[tile], 0, sizeof(emulated_tiles.bytes[tile]));
}

template <int tile>
static inline void LoadTile(const void* base, std::size_t stride) {
  ZeroTile<tile>();
  for (std::size_t row = 0; row < emulated_tiles.config.rows[tile]; ++row) {
    std::memcpy(emulated_tiles.bytes[tile][row], static_cast<const uint8_t*>(base) + row * stride,
                emulated_tiles.config.row_bytes[tile]);
  }
}

template <int tile>
static inline void StoreTile(void* base, std::size_t stride) {
  RequireConfigured(tile);
  for (std::size_t row = 0; row < emulated_tiles.config.rows[tile]; ++row) {
    std::memcpy(static_cast<uint8_t*>(base) + row * stride, emulated_tiles.bytes[tile][row],
                emulated_tiles.config.row_bytes[tile]);
  }
}

template <int c, int a, int b>
static inline void AddTileProduct() {
  RequireConfigured(c);
  RequireConfigured(a);
  RequireConfigured(b);
  EmulatedTiles& tiles = emulated_tiles;
  const TileConfig& config = tiles.config;
  RequireTile(config.rows[c] == config.rows[a] && config.row_bytes[c] == config.row_bytes[b] &&
                  config.row_bytes[a] == 4 * config.rows[b],
              "sizes of a product");
  for (std::size_t m = 0; m < config.rows[c]; ++m) {
    for (std::size_t n = 0; n < config.row_bytes[c] / 4U; ++n) {
      int32_t sum;
      std::memcpy(&sum, &tiles.bytes[c][m][4 * n], sizeof(sum));
      for (std::size_t k = 0; k < config.rows[b]; ++k) {
        for (std::size_t i = 0; i < 4; ++i) {
          sum += static_cast<int8_t>(tiles.bytes[a][m][4 * k + i]) *
                 static_cast<int8_t>(tiles.bytes[b][k][4 * n + i]);
        }
      }
      std::memcpy(&tiles.bytes[c][m][4 * n], &sum, sizeof(sum));
    }
  }
}

}  // namespace bivlm

#endif  // BIVLM_CPU_AMX_TILES_H_
