#include <gtest/gtest.h>

#include <cstdio>

// As GoogleTest's own main, except that a program in which nothing would run fails: a filter that
// matches nothing, or a file whose tests were all removed, must not count as a pass.
int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const int failed = RUN_ALL_TESTS();
  const testing::UnitTest& unit_test = *testing::UnitTest::GetInstance();
  if (!GTEST_FLAG_GET(list_tests) && unit_test.test_to_run_count() == 0) {
    std::fprintf(stderr, "no test ran\n");
    return 1;
  }
  return failed;
}
