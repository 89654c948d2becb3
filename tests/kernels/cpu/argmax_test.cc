#include <vector>

#include "gtest/gtest.h"
#include "tests/kernels/cpu/kernel_fixture.h"

namespace kvsweep {
namespace {

// Ranks go down by logit, ties up by id.
TEST(Argmax, TakesTheTokenOfEachRank) {
  Device device;
  const std::vector<float> row = {1, 5, 3, 5, -2, 3};
  const std::vector<int32_t> order = {1, 3, 2, 5, 0, 4};
  std::vector<float> logits;
  for (int i = 0; i < 6; ++i) logits.insert(logits.end(), row.begin(), row.end());
  int32_t* const token = device.Room<int32_t>(6);
  device.backend.Argmax({.token = token,
                         .logits = device.PutRows(logits, 6, 6),
                         .target = device.Put(std::vector<int32_t>{0, 1, 2, 3, 4, 5}),
                         .rank = device.Put(std::vector<int32_t>{0, 1, 2, 3, 4, 5}),
                         .rows = 6,
                         .columns = 6},
                        Stream::kCompute);
  ASSERT_TRUE(device.backend.WaitAll().ok());
  EXPECT_EQ(std::vector<int32_t>(token, token + 6), order);
}

}  // namespace
}  // namespace kvsweep
