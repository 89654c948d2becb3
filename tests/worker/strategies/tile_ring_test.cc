#include "worker/strategies/tile_ring.h"

#include <gtest/gtest.h>

#include "kernels/cpu/cpu_backend.h"

namespace kvsweep {
namespace {

TileRing NewRing(Backend* backend) {
  constexpr int32_t kTokens = 256;
  constexpr int32_t kHeads = 2;
  constexpr int32_t kHeadDim = 8;
  std::byte* const memory =
      backend->Allocate(Tier::kDevice, 2 * kTokens * kHeads * 2 * kHeadDim * sizeof(float)).value();
  return TileRing(backend, memory, DType::kF32, kTokens, /*most_rows=*/8, kHeads, kHeadDim);
}

TEST(TileRingTest, RowsShareATile) {
  const auto backend = CreateCpuBackend({.threads = 1}).value();
  const TileRing ring = NewRing(backend.get());
  EXPECT_EQ(ring.TileTokens(1), 256);
  EXPECT_EQ(ring.TileTokens(8), 32);
  EXPECT_EQ(ring.PaddedTiles(8, 0), 1);
  EXPECT_EQ(ring.PaddedTiles(8, 5 * 32), 6);  // of 1, 2, 3, 4, 6
  EXPECT_EQ(ring.TileLadder(8, 5 * 32), (std::vector<int32_t>{1, 2, 3, 4, 6}));
}

// Attention adds tile after tile, so where they end is part of a result.
TEST(TileRingTest, TilesOfBatchInvariantBackendsDoNotDependOnTheRows) {
  const auto backend = CreateCpuBackend({.threads = 1, .batch_invariant = true}).value();
  const TileRing ring = NewRing(backend.get());
  for (const int32_t rows : {1, 2, 5, 8}) EXPECT_EQ(ring.TileTokens(rows), 32) << rows;
  EXPECT_EQ(ring.WholeTokens(), 256);  // a prompt shares with nobody
}

}  // namespace
}  // namespace kvsweep
