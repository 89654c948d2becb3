#include "worker/runner/node.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "base/file.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvsweep {
namespace {

const BackendInfo kGpu = {.backend = "cuda",
                          .device = "a GPU",
                          .device_class = "a GPU, bf16",
                          .driver = "driver 999",
                          .pci_address = "0000:ff:1f.7"};

TEST(Node, OfTheCpuBackendHasNothingToTell) {
  Node node({.cache = "",
             .make_backend = [] { return absl::InternalError("not to be asked"); },
             .read_device = nullptr});
  node.Update({.backend = "cpu", .device = "a processor"});
  EXPECT_EQ(node.nvml(), nullptr);
  EXPECT_EQ(node.preflight(), nullptr);
  EXPECT_TRUE(node.Facts().empty());
}

TEST(Node, MeasuresItsPreflightOnceAndKeepsIt) {
  const TempDir cache;
  int made = 0;
  const auto options = [&] {
    return NodeOptions{.cache = cache.Join("below"),
                       .lock = cache.Join("lock"),
                       .make_backend =
                           [&] {
                             ++made;
                             return CreateCpuBackend({.threads = 1});
                           },
                       .read_device = nullptr};
  };
  Node first(options());
  first.Update(kGpu);
  ASSERT_NE(first.preflight(), nullptr);
  first.Update(kGpu);
  EXPECT_EQ(made, 1);
  const auto facts = first.Facts();
  EXPECT_EQ(facts.at("preflight"), first.preflight()->Name());
  EXPECT_TRUE(facts.contains("limit: read"));
  EXPECT_TRUE(absl::StartsWith(facts.at("nvml"), "none: ")) << "no such device here";

  Node second(options());
  second.Update(kGpu);
  EXPECT_EQ(made, 1) << "it is in the cache";
  EXPECT_EQ(second.preflight()->Name(), first.preflight()->Name());

  // An old one is measured anew.
  const std::string path = PreflightPath(cache.Join("below"), first.preflight()->subject);
  Preflight old = *first.preflight();
  old.measured_unix_ns -= kPreflightAgeNs;
  ASSERT_TRUE(WriteFileAtomic(path, PreflightText(old)).ok());
  Node third(options());
  third.Update(kGpu);
  EXPECT_EQ(made, 2);
  EXPECT_NE(third.preflight()->Name(), old.Name());
}

// Runners of a host, as its slots have them.
TEST(Node, PreflightsOfAHostComeOneByOne) {
  const TempDir folder;
  std::atomic<int> measuring = 0;
  std::atomic<int> met = 0;
  std::vector<std::thread> runners;
  for (int i = 0; i < 4; ++i) {
    runners.emplace_back([&] {
      Node node({.cache = "",
                 .lock = folder.Join("lock"),
                 .lock_patience_ns = 3600 * kNsPerSecond,
                 .make_backend = [&]() -> absl::StatusOr<std::unique_ptr<Backend>> {
                   met += ++measuring > 1;
                   RealClock::Get().SleepUntilNs(RealClock::Get().NowNs() + 20 * kNsPerMs);
                   --measuring;
                   return absl::UnavailableError("enough");
                 },
                 .read_device = nullptr});
      node.Update(kGpu);
    });
  }
  for (std::thread& runner : runners) runner.join();
  EXPECT_EQ(met, 0);
}

TEST(Node, APreflightDoesNotWaitForEver) {
  const TempDir folder;
  const std::string lock = folder.Join("lock");
  const int held = open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  ASSERT_EQ(flock(held, LOCK_EX), 0);
  for (const std::string& path : {lock, folder.Join("no/such/folder/lock")}) {
    int made = 0;
    Node node({.cache = "",
               .lock = path,
               .lock_patience_ns = 1,
               .make_backend = [&]() -> absl::StatusOr<std::unique_ptr<Backend>> {
                 ++made;
                 return absl::UnavailableError("enough");
               },
               .read_device = nullptr});
    node.Update(kGpu);
    EXPECT_EQ(made, 1) << path;
  }
  close(held);
}

TEST(Node, SaysWhyItHasNoPreflight) {
  Node node({.cache = "",
             .make_backend = [] { return absl::ResourceExhaustedError("no memory left"); },
             .read_device = nullptr});
  node.Update(kGpu);
  EXPECT_EQ(node.preflight(), nullptr);
  EXPECT_EQ(node.Facts().at("preflight"), "none: no memory left");
}

}  // namespace
}  // namespace kvsweep
