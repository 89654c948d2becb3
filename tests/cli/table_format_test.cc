#include "cli/table_format.h"

#include <gtest/gtest.h>

#include <limits>
#include <nlohmann/json.hpp>

namespace kvsweep {
namespace {

Table Sample() {
  Table table;
  table.columns = {"arm", "value", "note"};
  table.rows = {{std::string("paged"), int64_t{12}, std::string("a, \"b\"\nc|d")},
                {std::string("h2o-20 ±"), 0.125, std::monostate()},
                {std::string("x"), std::numeric_limits<double>::infinity(), Blob{"\x01\xff"}}};
  return table;
}

TEST(FormatTable, AlignsNumbersRightAndTextsLeft) {
  EXPECT_EQ(FormatTable(Sample(), ReportFormat::kTable),
            "arm       value  note\n"
            "paged        12  a, \"b\" c|d\n"
            "h2o-20 ±  0.125  -\n"
            "x           inf  01ff\n");
}

TEST(FormatTable, CsvQuotesWhatNeedsIt) {
  EXPECT_EQ(
      FormatTable(Sample(), ReportFormat::kCsv),
      "arm,value,note\r\npaged,12,\"a, \"\"b\"\"\nc|d\"\r\nh2o-20 ±,0.125,\r\nx,inf,01ff\r\n");
}

TEST(FormatTable, MarkdownKeepsItsColumns) {
  EXPECT_EQ(FormatTable(Sample(), ReportFormat::kMarkdown),
            "| arm | value | note |\n| --- | --- | --- |\n| paged | 12 | a, \"b\" c\\|d |\n"
            "| h2o-20 ± | 0.125 |  |\n| x | inf | 01ff |\n");
}

TEST(FormatTable, JsonKeepsTypes) {
  Table table = Sample();
  table.rows.push_back({std::string("not UTF-8: \xff"), int64_t{1}, std::monostate()});
  const auto json = nlohmann::json::parse(FormatTable(table, ReportFormat::kJson));
  EXPECT_EQ(json[0]["value"], 12);
  EXPECT_EQ(json[0]["note"], "a, \"b\"\nc|d");
  EXPECT_TRUE(json[1]["note"].is_null());
  EXPECT_EQ(json[2]["value"], "inf");
  EXPECT_EQ(json.size(), 4u);
}

TEST(FormatTable, CutsLongValuesBetweenCharacters) {
  Table table;
  table.columns = {"a"};
  std::string text;
  for (int i = 0; i < 100; ++i) text += "é";
  table.rows = {{text}};
  const std::string formatted = FormatTable(table, ReportFormat::kTable);
  EXPECT_LT(formatted.size(), text.size());
  const nlohmann::json whole = formatted;
  EXPECT_NO_THROW(whole.dump()) << "still UTF-8";
}

}  // namespace
}  // namespace kvsweep
