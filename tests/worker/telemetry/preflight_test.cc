#include "worker/telemetry/preflight.h"

#include <gtest/gtest.h>

#include "absl/strings/str_replace.h"

namespace kvsweep {
namespace {

Preflight Example() {
  return {.subject = "H200, bf16; 0000:1b:00.0; driver 999; node7; build",
          .measured_unix_ns = 1'700'000'000 * kNsPerSecond,
          .element_bytes = 2,
          .limits = {{"read", 4.6e12 / 3, "B/s", 0.001},
                     {"link to device", 55e9, "B/s", 0.02},
                     {"bf16 product of 8192^3", 770e12, "op/s", 0.01},
                     {"graph node", 512.5, "ns", 0.05}}};
}

TEST(Preflight, ComesBackFromItsTextToTheBit) {
  const Preflight preflight = Example();
  const absl::StatusOr<Preflight> back = ParsePreflight(PreflightText(preflight));
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->subject, preflight.subject);
  EXPECT_EQ(back->measured_unix_ns, preflight.measured_unix_ns);
  ASSERT_EQ(back->limits.size(), 4u);
  EXPECT_EQ(back->limits[0].value, preflight.limits[0].value);
  EXPECT_EQ(back->Name(), preflight.Name());
  EXPECT_EQ(preflight.Name().substr(0, 17), "20231114T221320Z-");
}

TEST(Preflight, GivesTheLimitsThatFloorsAreMadeOf) {
  const DeviceProfile profile = Example().Profile();
  EXPECT_EQ(profile.device_bytes_per_s, 4.6e12 / 3);
  EXPECT_EQ(profile.link_bytes_per_s, 55e9);
  EXPECT_EQ(profile.operations_per_s, 770e12);
  EXPECT_EQ(profile.operation_ns, 512.5);
  EXPECT_EQ(Example().Facts().at("limit: link to device"), "5.5e+10 B/s, spread 2.0 %");
}

TEST(Preflight, GrowsOldAndDoesNotComeFromTheFuture) {
  const Preflight preflight = Example();
  EXPECT_TRUE(preflight.IsFresh(preflight.measured_unix_ns));
  EXPECT_TRUE(preflight.IsFresh(preflight.measured_unix_ns + kPreflightAgeNs - 1));
  EXPECT_FALSE(preflight.IsFresh(preflight.measured_unix_ns + kPreflightAgeNs));
  EXPECT_FALSE(preflight.IsFresh(preflight.measured_unix_ns - 1));
}

TEST(Preflight, AnotherDeviceOrBuildIsAnotherSubject) {
  BackendInfo info{.device_class = "H200, bf16", .driver = "999", .pci_address = "0000:1b:00.0"};
  const std::string subject = PreflightSubject(info, "a");
  EXPECT_NE(subject, PreflightSubject(info, "b"));
  EXPECT_NE(PreflightPath("/c", subject), PreflightPath("/c", PreflightSubject(info, "b")));
  info.pci_address = "0000:2b:00.0";
  EXPECT_NE(subject, PreflightSubject(info, "a"));
}

TEST(Preflight, RefusesWhatItIsNot) {
  const std::string text = PreflightText(Example());
  for (const std::string& broken :
       {std::string(), std::string("x\n") + text, text.substr(0, 30), text + "read\t1\n",
        absl::StrReplaceAll(text, {{"512.5", "many"}})}) {
    EXPECT_EQ(ParsePreflight(broken).status().code(), absl::StatusCode::kInvalidArgument) << broken;
  }
}

}  // namespace
}  // namespace kvsweep
