// The main function of the tests that need a device. Where there is none they are skipped, with
// their number and the reason, and the program says so by its exit code.
#include <gtest/gtest.h>

#include <iostream>
#include <string_view>

#include "absl/status/status.h"
#include "kernels/cuda/cuda_backend.h"

namespace {

constexpr int kSkipped = 77;  // SKIP_RETURN_CODE of the tests

}  // namespace

int RunnerMain(int argc, char** argv);  // worker/runner/runner_main.cc

// Called as a runner it is one (device_faults_test.cc).
int main(int argc, char** argv) {
  if (argc > 1 && std::string_view(argv[1]) == "--fd") return RunnerMain(argc, argv);
  testing::InitGoogleTest(&argc, argv);
  const absl::Status device = kvsweep::ProbeCuda();
  if (!device.ok() && !testing::GTEST_FLAG(list_tests)) {
    std::cout << "SKIPPED " << testing::UnitTest::GetInstance()->total_test_count()
              << " tests that need a GPU: " << device.message() << std::endl;
    return kSkipped;
  }
  return RUN_ALL_TESTS();
}
