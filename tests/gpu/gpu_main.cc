// The main function of the tests that need a device. Where there is none they are skipped, with
// their number and the reason, and the program says so by its exit code.
#include <gtest/gtest.h>

#include <iostream>

#include "absl/status/status.h"
#include "kernels/cuda/cuda_backend.h"

namespace {

constexpr int kSkipped = 77;  // SKIP_RETURN_CODE of the tests

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const absl::Status device = kvsweep::ProbeCuda();
  if (!device.ok() && !testing::GTEST_FLAG(list_tests)) {
    std::cout << "SKIPPED " << testing::UnitTest::GetInstance()->total_test_count()
              << " tests that need a GPU: " << device.message() << std::endl;
    return kSkipped;
  }
  return RUN_ALL_TESTS();
}
