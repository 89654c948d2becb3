// Plays tests/golden/cli/*.txt: every line "$ kvsweep ..." is run, and below it stand its output,
// what it said on stderr ("! " before each line) and its exit code. KVSWEEP_UPDATE_GOLDEN=1
// rewrites the files.

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/check.h"
#include "base/file.h"
#include "tests/cli/process.h"

namespace kvsweep {
namespace {

constexpr char kFolder[] = "tests/golden/cli";

// Words as a shell would split them, with double quotes only.
std::vector<std::string> Words(absl::string_view line) {
  std::vector<std::string> words;
  bool quoted = false;
  bool inside = false;
  for (const char c : line) {
    if (c == '"') {
      quoted = !quoted;
      if (!inside) words.emplace_back();
      inside = true;
    } else if (c == ' ' && !quoted) {
      inside = false;
    } else {
      if (!inside) words.emplace_back();
      inside = true;
      words.back() += c;
    }
  }
  return words;
}

void AppendLines(absl::string_view text, absl::string_view prefix, std::string* played) {
  if (text.empty()) return;
  text = absl::StripSuffix(text, "\n");
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    absl::StrAppend(played, prefix, absl::StripSuffix(line, "\r"), "\n");
  }
}

// The transcript with all answers made anew; lines that begin with # are comments.
std::string Play(const std::string& text) {
  std::string played;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    if (absl::StartsWith(line, "#")) absl::StrAppend(&played, line, "\n");
    if (!absl::ConsumePrefix(&line, "$ kvsweep")) continue;
    const ProcessResult result = RunProgram("kvsweep", Words(line));
    absl::StrAppend(&played, "$ kvsweep", line, "\n");
    AppendLines(result.out, "  ", &played);
    AppendLines(result.err, "! ", &played);
    absl::StrAppend(&played, "= ", result.exit_code, "\n");
  }
  return played;
}

TEST(Transcript, CommandsAnswerAsWrittenDown) {
  size_t transcripts = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kFolder)) {
    const std::string path = entry.path().generic_string();
    SCOPED_TRACE(path);
    const auto golden = ReadFile(path, 1 << 20);
    ASSERT_TRUE(golden.ok()) << golden.status();
    const std::string played = Play(*golden);
    ++transcripts;
    if (std::getenv("KVSWEEP_UPDATE_GOLDEN") != nullptr) {
      std::ofstream(path) << played;
      continue;
    }
    EXPECT_EQ(played, *golden) << "KVSWEEP_UPDATE_GOLDEN=1 rewrites " << path;
  }
  EXPECT_GE(transcripts, 4u);
}

}  // namespace
}  // namespace kvsweep
