// What a device can do to a trial: an illegal access, an endless kernel, the runner's death, too
// little memory. `kvsweep run` with this program as its runner; each costs one trial (or one repeat
// of it).
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/check.h"
#include "base/file.h"

namespace kvsweep {
namespace {

using testing::HasSubstr;
using testing::UnorderedElementsAre;

class DeviceFaultsTest : public testing::Test {
 protected:
  // Runs the experiment of a spec; the fault happens once.
  void Run(const std::string& spec, const std::string& fault) {
    const std::string mark = folder_.Join("mark");
    KVSWEEP_CHECK_OK(WriteFileAtomic(mark, ""));
    setenv("KVSWEEP_DEVICE_FAULT", fault.c_str(), 1);
    setenv("KVSWEEP_DEVICE_FAULT_MARK", mark.c_str(), 1);
    const std::string self = std::filesystem::read_symlink("/proc/self/exe");
    Shell(absl::StrCat("run ", spec, " --store ", store(), " --cache ", folder_.Join("cache"),
                       " --runner ", self));
    unsetenv("KVSWEEP_DEVICE_FAULT");
    if (fault != "none") {
      EXPECT_NE(access(mark.c_str(), F_OK), 0) << "the fault did not happen";
    }
  }

  // The rows of an answer, without its title.
  std::vector<std::string> Ask(const std::string& sql) {
    std::vector<std::string> rows = absl::StrSplit(
        Shell(absl::StrCat("query --store ", store(), " --output csv --sql \"", sql, "\"")), "\r\n",
        absl::SkipEmpty());
    if (!rows.empty()) rows.erase(rows.begin());
    return rows;
  }

  std::vector<std::string> Outcomes() { return Ask("SELECT outcome FROM v_trials"); }

 private:
  std::string store() const { return folder_.Join("store.db"); }

  // Beside this program, or in the build's folder of programs.
  static std::string Kvsweep() {
    const std::filesystem::path folder =
        std::filesystem::read_symlink("/proc/self/exe").parent_path();
    const std::filesystem::path beside = folder / "kvsweep";
    return std::filesystem::exists(beside) ? beside : folder.parent_path() / "bin" / "kvsweep";
  }

  std::string Shell(const std::string& arguments) {
    const std::string out = folder_.Join("out");
    const std::string command =
        absl::StrCat(Kvsweep(), " ", arguments, " >", out, " 2>", folder_.Join("err"));
    const int status = std::system(command.c_str());
    EXPECT_NE(status, -1);
    const absl::StatusOr<std::string> text = ReadFile(out, 1 << 20);
    KVSWEEP_CHECK_OK(text);
    return *text;
  }

  TempDir folder_;
};

TEST_F(DeviceFaultsTest, AnIllegalAccessCostsItsTrial) {
  Run("tests/gpu/faults.yaml", "illegal access");
  EXPECT_THAT(Outcomes(), UnorderedElementsAre("crashed", "ok", "ok"));
  EXPECT_THAT(Ask("SELECT evidence FROM v_trials WHERE outcome = 'crashed'"),
              testing::ElementsAre(HasSubstr("illegal memory access")));
}

TEST_F(DeviceFaultsTest, AnEndlessKernelIsATimeout) {
  Run("tests/gpu/faults.yaml", "hang");
  EXPECT_THAT(Outcomes(), UnorderedElementsAre("timeout", "ok", "ok"));
}

TEST_F(DeviceFaultsTest, ATrialWhoseRunnerDiedIsRepeated) {
  Run("tests/gpu/faults.yaml", "die");
  EXPECT_THAT(Outcomes(), UnorderedElementsAre("ok", "ok", "ok"));
  EXPECT_THAT(Ask("SELECT max(executions) FROM v_trials"), testing::ElementsAre("2"));
}

TEST_F(DeviceFaultsTest, TooLittleMemoryIsToldInBytes) {
  Run("tests/gpu/out-of-memory.yaml", "none");
  EXPECT_THAT(Outcomes(), UnorderedElementsAre("oom", "ok"));
  EXPECT_THAT(Ask("SELECT count(*) FROM v_outcomes WHERE asked_bytes > available_bytes AND "
                  "available_bytes > 0"),
              testing::ElementsAre("1"));
}

}  // namespace
}  // namespace kvsweep
