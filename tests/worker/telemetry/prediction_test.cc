#include "worker/telemetry/prediction.h"

#include <gtest/gtest.h>

namespace kvsweep {
namespace {

constexpr DeviceProfile kMachine = {.name = "",
                                    .device_bytes_per_s = 4e12,
                                    .link_bytes_per_s = 50e9,
                                    .operations_per_s = 800e12,
                                    .operation_ns = 500};

// Llama-3.1-8B in bf16: 8 KV heads of 128, 32 layers.
constexpr ModelWork kModel = {.weight_bytes = 15e9,
                              .operations_per_row = 15e9,
                              .entry_bytes = 2 * 2 * 8 * 128,
                              .operations_per_entry = 4.0 * 32 * 128,
                              .layers = 32};

TEST(Prediction, OfASmallBatchIsTheReadingOfWeightsAndCache) {
  const DecodeWork work{.rows = 8, .attended = 8.0 * 1000 * 32};
  const Cost cost = DecodeCost(kModel, work);
  const double appended = 8 * 32 * 4096.0;
  EXPECT_EQ(cost.device_bytes, 15e9 + 8 * 1000 * 32 * 4096.0 + appended);
  EXPECT_EQ(cost.link_bytes, 0);
  EXPECT_EQ(FloorNs(cost, kMachine), cost.device_bytes / 4e12 * 1e9) << "no launch counts";
}

TEST(Prediction, OfFetchedRowsIsTheLink) {
  const DecodeWork work{.rows = 8, .attended = 8.0 * 1000 * 32, .fetched = 8.0 * 1000 * 30};
  const Cost cost = DecodeCost(kModel, work);
  EXPECT_EQ(cost.link_bytes, 8 * 1000 * 30 * 4096.0);
  EXPECT_EQ(FloorNs(cost, kMachine), cost.link_bytes / 50e9 * 1e9);
}

TEST(Prediction, OfALargeBatchIsArithmetic) {
  const Cost cost = DecodeCost(kModel, {.rows = 4096, .attended = 0});
  EXPECT_EQ(FloorNs(cost, kMachine), 4096 * 15e9 / 800e12 * 1e9);
}

}  // namespace
}  // namespace kvsweep
