// Two buffers through which entries of the host tier stream to attention: while one tile is
// attended to on Stream::kCompute, the next is copied on Stream::kHostToDevice.
//
// A step calls Fork once, before its first tile. Each tile is loaded, used and freed before the
// next is loaded; the copies run ahead of their use as far as the two buffers allow.
#ifndef KVSWEEP_WORKER_STRATEGIES_TILE_RING_H_
#define KVSWEEP_WORKER_STRATEGIES_TILE_RING_H_

#include <array>
#include <cstdint>
#include <vector>

#include "kernels/backend.h"

namespace kvsweep {

// Tokens of a tile, all rows together, from `least` to `most`: so many that a tile's start and end
// on the link do not count beside it, where the device's budget is large beside two tiles.
// `token_bytes`: keys and values of a token, of one layer.
int32_t RingTokens(int32_t least, int64_t most, uint64_t token_bytes, uint64_t device_bytes);

class TileRing {
 public:
  // `memory`: device memory of 2 x [tokens][heads][key, value][head_dim] elements of `dtype`.
  // `most_rows`: of a step. Borrows the backend.
  TileRing(Backend* backend, std::byte* memory, DType dtype, int32_t tokens, int32_t most_rows,
           int32_t heads, int32_t head_dim);

  // Tokens of a tile that one sequence has for itself.
  int32_t WholeTokens() const { return tokens_; }
  // Tokens of a tile that the rows of a step share. Where a row's result must not depend on the
  // rows beside it, tiles are as short as most_rows make them: attention adds tile after tile.
  int32_t TileTokens(int32_t rows) const {
    return tokens_ / (fixed_rows_ > 0 ? fixed_rows_ : rows);
  }
  // How many tiles a step loads for sequences of at most `tokens` tokens: as many as they need,
  // rounded up to a ladder so that few graphs serve all lengths. At least 1.
  int32_t PaddedTiles(int32_t rows, int32_t tokens) const;
  // Every value of it for sequences of at most `most_tokens` tokens, ascending.
  std::vector<int32_t> TileLadder(int32_t rows, int32_t most_tokens) const;

  // Copies may begin when Stream::kCompute has come here: what they read was written before.
  void Fork();

  // Enqueues the copy of a tile, `args` without its target, and lets Stream::kCompute wait for it.
  // Returns the tile: row b holds row b of the source (row 0 the one row of args.row), with the
  // source's lengths.
  KvView Load(CopyTileArgs args);
  // The tile that was loaded last has been used.
  void Free();

  // A tile of no tokens, with the lengths of `source`: for calls that attend to nothing stored.
  KvView Nothing(const KvView& source) const;

 private:
  struct Buffer {
    Event ready;
    Event free;
    bool used = false;  // since Fork
  };

  KvView View(int buffer, int32_t tokens) const;

  Backend* backend_;
  std::byte* memory_;
  DType dtype_;
  int32_t tokens_;
  int32_t fixed_rows_;  // 0: those of the step
  int32_t heads_;
  int32_t head_dim_;
  Event fork_;
  std::array<Buffer, 2> buffers_;
  int current_ = 0;
};

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_STRATEGIES_TILE_RING_H_
