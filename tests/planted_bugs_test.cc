// Tests of the tests: each planted bug (base/planted_bug.h) is switched on in turn, and the test
// that is named beside it must fail; with none switched on the same test must pass, and must have
// run.

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <ostream>
#include <string>

#include "absl/strings/str_cat.h"

namespace kvsweep {
namespace {

struct Planted {
  const char* bug;      // as BugPlanted names it
  const char* program;  // test program
  const char* filter;   // the tests that catch it

  friend void PrintTo(const Planted& planted, std::ostream* out) { *out << planted.bug; }
};

constexpr Planted kPlanted[] = {
    {"shared_page_freed", "worker_strategies_paged_manager_test", "PagedManagerTest.*"},
    {"content_outlives_page", "worker_strategies_paged_manager_test", "PagedManagerTest.*"},
    {"hash_without_prefix", "worker_strategies_paged_manager_test",
     "*RandomRunsKeepEveryPromise/shared"},
    {"fork_written_in_place", "worker_strategies_paged_manager_test", "PagedManagerTest.*"},
    {"slot_off_by_one", "worker_strategies_paged_test", "*AnyBlockSize*"},
    {"admitted_beside_preemption", "worker_engine_batcher_test", "*"},
    {"budget_overdrawn", "worker_engine_batcher_test", "*"},
    {"gather_not_awaited", "worker_strategies_conformance_test", "StreamOrderTest.*"},
    {"swap_out_not_awaited", "worker_strategies_h2o_test", "H2oPreemptionTest.ASwapped*"},
    {"swap_in_not_awaited", "worker_strategies_paged_test", "*Swapped*"},
    {"given_up_pages_not_awaited", "worker_strategies_paged_test", "*Swapped*"},
    {"pinned_copy_reused", "kernels_step_state_test", "*"},
    {"argmin_over_window", "kernels_cpu_heavy_test", "*"},
    {"ties_evict_the_earlier", "kernels_cpu_heavy_test", "*"},
    {"new_token_starts_at_zero", "kernels_cpu_heavy_test", "*"},
    {"rolling_ranks_unsorted", "worker_strategies_h2o_test", "*IsItsDefinition/rolling"},
    {"prune_keeps_the_later_of_ties", "kernels_cpu_heavy_test", "*"},
    {"column_sum_sees_the_future", "kernels_cpu_column_sum_test", "*"},
    {"threshold_of_another_head", "kernels_cpu_speculate_test", "*"},
    {"selection_unsorted", "kernels_cpu_select_top_test", "*"},
    {"current_token_missing", "kernels_cpu_decode_attention_test", "*"},
};

// Exit code of the test program; 128 + the signal that ended it.
int RunTests(const Planted& planted, const std::string& bug) {
  const std::string command = absl::StrCat(
      "KVSWEEP_PLANTED_BUG='", bug, "' '", KVSWEEP_TEST_DIR, "/", planted.program,
      "' --gtest_fail_fast --gtest_brief=1 --gtest_filter='", planted.filter, "' >/dev/null 2>&1");
  const int status = std::system(command.c_str());
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

class PlantedBugTest : public testing::TestWithParam<Planted> {};

TEST_P(PlantedBugTest, IsCaughtByItsTest) {
#ifndef KVSWEEP_PLANTED_BUGS
  std::printf("SKIPPED: this build plants no bugs; the asan preset does\n");
  return;
#endif
  EXPECT_EQ(RunTests(GetParam(), ""), 0) << "fails without any bug";
  const int exit_code = RunTests(GetParam(), GetParam().bug);
  EXPECT_NE(exit_code, 0) << "the bug went unnoticed";
  EXPECT_LT(exit_code, 126 + 128) << "the program could not be run";
  EXPECT_NE(exit_code, 127) << "the program could not be run";
}

INSTANTIATE_TEST_SUITE_P(, PlantedBugTest, testing::ValuesIn(kPlanted),
                         [](const auto& info) { return std::string(info.param.bug); });

}  // namespace
}  // namespace kvsweep
