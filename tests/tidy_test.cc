// Reads the source of the project and holds it to the rules that a compiler does not know: who may
// include whom, that time, chance and sleeping come from base alone, that no test is switched off
// or forgotten, and that no source file belongs to no target. Runs in the root of the tree.

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <optional>
#include <regex>
#include <sstream>
#include <string>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "base/check.h"
#include "base/digest.h"
#include "base/file.h"

namespace kvsweep {
namespace {

constexpr int64_t kSourceBytes = 4 << 20;

// ---------------------------------------------------------------------------------------------------------------------
// The rules

// Libraries from outside, by the headers that give them away. The standard library, POSIX and
// abseil are open to all.
struct Library {
  std::string name;
  std::vector<std::string> header_prefixes;
};

const std::vector<Library>& Libraries() {
  static const auto& libraries = *new std::vector<Library>{
      {"OpenSSL", {"openssl/"}},
      {"spdlog", {"spdlog/", "fmt/"}},
      {"BLAS", {"cblas.h", "openblas"}},
      {"Eigen", {"Eigen/"}},
      {"CUDA", {"cuda", "cublas", "cub/", "nvtx"}},
      {"NCCL", {"nccl"}},
      {"nlohmann-json", {"nlohmann/"}},
      {"Unicode", {"pcre2", "utf8proc"}},
      {"protobuf reflection",
       {"google/protobuf/descriptor", "google/protobuf/dynamic_message",
        "google/protobuf/message.h", "google/protobuf/reflection", "google/protobuf/util/"}},
      {"protobuf", {"google/protobuf/"}},
      {"yaml-cpp", {"yaml-cpp/"}},
      {"Boost.Math", {"boost/math/"}},
      {"Boost", {"boost/"}},
      {"SQLite", {"sqlite3"}},
      {"zstd", {"zstd"}},
      {"gRPC", {"grpc/", "grpcpp/", "grpc++/"}},
      {"HTTP", {"httplib.h"}},
      {"metrics", {"prometheus/"}},
      {"CLI11", {"CLI/"}},
      {"GoogleTest", {"gtest/", "gmock/"}},
  };
  return libraries;
}

// Which files form a part, and what they may include: paths from the root of the tree by prefix
// ("a/*" is the folder without those below it), libraries by name. A file belongs to the first part
// with a matching prefix.
struct Part {
  std::vector<std::string> files;
  std::vector<std::string> may_include;
  std::vector<std::string> libraries;
};

// Of the kernels, strategies see the interface alone. step_state.h holds the part of it that lives
// on the device.
std::vector<std::string> StrategyIncludes() {
  return {"base/",
          "kernels/backend.h",
          "kernels/shapes.h",
          "kernels/cost.h",
          "kernels/step_state.h",
          "worker/strategies/",
          "proto/experiment.pb.h"};
}

// Who may use generated messages may use the library that they are made of, but not its reflection:
// that is for proto/schema, and for those who speak gRPC.
const std::vector<Part>& Parts() {
  static const auto& parts = *new std::vector<Part>{
      {{"base/"}, {"base/"}, {"OpenSSL", "spdlog"}},
      {{"kernels/cpu/"}, {"base/", "kernels/"}, {"BLAS"}},
      {{"kernels/cuda/"}, {"base/", "kernels/"}, {"CUDA"}},
      {{"kernels/comm_nccl"}, {"base/", "kernels/"}, {"CUDA", "NCCL"}},
      {{"kernels/"}, {"base/", "kernels/"}, {}},
      {{"worker/strategies/skewing"}, StrategyIncludes(), {"Eigen", "protobuf"}},
      {{"worker/strategies/"}, StrategyIncludes(), {"protobuf"}},
      {{"worker/engine/"},
       {"base/", "kernels/", "worker/strategies/", "worker/engine/", "proto/experiment.pb.h"},
       {"nlohmann-json", "protobuf", "Unicode"}},
      {{"worker/telemetry/"}, {"base/", "kernels/", "worker/telemetry/"}, {}},
      {{"worker/runner/"},
       {"base/", "experiments/", "worker/engine/", "worker/strategies/", "worker/runner/",
        "worker/telemetry/", "worker/frames.h", "kernels/", "proto/experiment.pb.h", "proto/runner.pb.h"},
       {"protobuf"}},
      {{"proto/"}, {"base/", "proto/"}, {"protobuf", "protobuf reflection", "yaml-cpp"}},
      {{"experiments/"},
       {"base/", "experiments/", "proto/schema", "proto/experiment.pb.h"},
       {"Boost.Math", "nlohmann-json", "protobuf"}},
      {{"storage/"},
       {"base/", "experiments/", "storage/", "proto/experiment.pb.h"},
       {"SQLite", "zstd", "protobuf"}},
      // The planners: ids, numbers and opaque payloads only.
      {{"coordinator/scheduler", "coordinator/roster"},
       {"base/", "coordinator/scheduler", "coordinator/roster"},
       {}},
      {{"worker/session", "worker/outbox"}, {"base/", "worker/session", "worker/outbox"}, {}},
      {{"coordinator/"},
       {"base/", "coordinator/", "experiments/", "storage/", "proto/"},
       {"protobuf", "protobuf reflection", "gRPC", "HTTP", "metrics"}},
      // Says which models and files a worker holds, by the same digests as a submission.
      {{"worker/round_files"},
       {"base/", "worker/*", "proto/", "experiments/files.h"},
       {"protobuf"}},
      {{"worker/"},
       {"base/", "worker/*", "proto/"},
       {"protobuf", "protobuf reflection", "gRPC", "HTTP", "metrics"}},
  };
  return parts;
}

// Wires whatever it likes together.
bool MayIncludeAnything(absl::string_view path) {
  return absl::StartsWith(path, "cli/") || absl::StartsWith(path, "tests/") ||
         absl::EndsWith(path, "_main.cc");
}

struct BannedCall {
  std::string pattern;
  std::string instead;
};

const std::vector<BannedCall>& BannedCalls() {
  static const auto& calls = *new std::vector<BannedCall>{
      {R"(_clock::now\s*\()", "Clock::NowNs or UnixNs of base/clock.h"},
      {R"(\babsl::(Now|GetCurrentTimeNanos)\b)", "Clock::NowNs or UnixNs of base/clock.h"},
      {R"(\b(clock_gettime|gettimeofday|timespec_get|gpr_now)\b)", "Clock of base/clock.h"},
      {R"(\btime\s*\(\s*(nullptr|NULL|0|&))", "Clock::UnixNs of base/clock.h"},
      {R"(\b(sleep|usleep|nanosleep|clock_nanosleep|sleep_for|sleep_until|SleepFor)\s*\()",
       "Clock::SleepUntilNs of base/clock.h"},
      {R"(\b(s?rand|rand_r|[dlm]rand48|random)\s*\(\s*\))", "Random of base/random.h"},
      {R"(\b(srand|random_device|mt19937(_64)?|default_random_engine|getrandom|BitGen)\b)",
       "Random or EntropySeed of base/random.h"},
      {R"(\bstd::(shuffle|\w+_distribution)\b)", "Random of base/random.h"},
  };
  return calls;
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading the tree

struct SourceFile {
  std::string path;  // from the root of the tree
  std::string text;
};

// All files below the folders of source with one of the extensions, sorted by path.
std::vector<SourceFile> ReadTree(const std::vector<std::string>& extensions) {
  std::vector<SourceFile> files;
  for (const char* folder : {"base", "proto", "kernels", "worker", "experiments", "storage",
                             "coordinator", "cli", "tests"}) {
    if (!std::filesystem::exists(folder)) continue;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
      const std::string path = entry.path().generic_string();
      const auto matches = [&](const std::string& end) { return absl::EndsWith(path, end); };
      if (!entry.is_regular_file() || std::none_of(extensions.begin(), extensions.end(), matches)) {
        continue;
      }
      auto text = ReadFile(path, kSourceBytes);
      KVSWEEP_CHECK_OK(text);
      files.push_back({path, *std::move(text)});
    }
  }
  std::sort(files.begin(), files.end(),
            [](const SourceFile& a, const SourceFile& b) { return a.path < b.path; });
  return files;
}

std::vector<SourceFile> ReadSources() { return ReadTree({".h", ".cc", ".cu", ".cuh"}); }

// The end of the comment or literal that begins at `begin`, or `begin` if none does.
size_t EndOfToken(const std::string& text, size_t begin) {
  const auto after = [&](const std::string& end, size_t from) {
    const size_t found = text.find(end, from);
    return found == std::string::npos ? text.size() : found + end.size();
  };
  const absl::string_view rest = absl::string_view(text).substr(begin);
  const bool in_word = begin > 0 && absl::ascii_isalnum(text[begin - 1]);
  if (absl::StartsWith(rest, "//")) return std::min(text.find('\n', begin), text.size());
  if (absl::StartsWith(rest, "/*")) return after("*/", begin + 2);
  if (absl::StartsWith(rest, "R\"") && !in_word) {
    const size_t open = rest.find('(');
    return after(absl::StrCat(")", rest.substr(2, open - 2), "\""), begin);
  }
  // A quote inside a word divides the digits of a number.
  if (rest[0] != '"' && (rest[0] != '\'' || in_word)) return begin;
  size_t end = begin + 1;
  while (end < text.size() && text[end] != rest[0] && text[end] != '\n')
    end += text[end] == '\\' ? 2 : 1;
  return std::min(end + 1, text.size());
}

// The text with comments and literals blanked; lines keep their numbers.
std::string CodeOnly(const std::string& text) {
  std::string code;
  for (size_t i = 0; i < text.size();) {
    const size_t end = EndOfToken(text, i);
    if (end == i) {
      code += text[i++];
      continue;
    }
    code.append(static_cast<size_t>(std::count(text.begin() + i, text.begin() + end, '\n')), '\n');
    code += ' ';
    i = end;
  }
  return code;
}

// "path:line: words" for each line of `text` in which `pattern` occurs.
void FindLines(const std::string& path, const std::string& text, const std::string& pattern,
               const std::string& words, std::vector<std::string>& violations) {
  const std::regex regex(pattern);
  int number = 0;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    std::match_results<const char*> match;
    if (std::regex_search(line.data(), line.data() + line.size(), match, regex)) {
      violations.push_back(absl::StrCat(path, ":", number, ": ", match.str(), ": ", words));
    }
  }
}

std::vector<std::string> IncludesOf(const std::string& text) {
  static const auto& include = *new std::regex(R"re((?:^|\n)\s*#\s*include\s*[<"]([^>"]+)[>"])re");
  std::vector<std::string> includes;
  for (std::sregex_iterator it(text.begin(), text.end(), include), end; it != end; ++it) {
    includes.push_back((*it)[1].str());
  }
  return includes;
}

bool StartsWithAny(absl::string_view text, const std::vector<std::string>& prefixes) {
  return std::any_of(prefixes.begin(), prefixes.end(), [&](absl::string_view prefix) {
    if (!absl::ConsumeSuffix(&prefix, "*")) return absl::StartsWith(text, prefix);
    return absl::StartsWith(text, prefix) && !absl::StrContains(text.substr(prefix.size()), '/');
  });
}

const Part* PartOf(absl::string_view path) {
  for (const Part& part : Parts()) {
    if (StartsWithAny(path, part.files)) return &part;
  }
  return nullptr;
}

// Empty: neither one of the libraries from outside nor one of our files, so the system's.
bool IncludeIsAllowed(const Part& part, const std::string& include) {
  for (const Library& library : Libraries()) {
    if (StartsWithAny(include, library.header_prefixes)) {
      return std::count(part.libraries.begin(), part.libraries.end(), library.name) > 0;
    }
  }
  const bool ours = PartOf(include) != nullptr || absl::StartsWith(include, "cli/") ||
                    absl::StartsWith(include, "tests/");
  return !ours || StartsWithAny(include, part.may_include);
}

// ---------------------------------------------------------------------------------------------------------------------
// The checks: a file in, violations out

std::vector<std::string> CheckIncludes(const SourceFile& file) {
  std::vector<std::string> violations;
  if (MayIncludeAnything(file.path)) return violations;
  const Part* part = PartOf(file.path);
  if (part == nullptr)
    return {absl::StrCat(file.path, ": belongs to no part of the include table")};
  for (const std::string& include : IncludesOf(file.text)) {
    if (IncludeIsAllowed(*part, include)) continue;
    violations.push_back(absl::StrCat(file.path, ": may not include ", include, "; allowed are ",
                                      absl::StrJoin(part->may_include, ", "), " ",
                                      absl::StrJoin(part->libraries, ", ")));
  }
  return violations;
}

std::vector<std::string> CheckCalls(const SourceFile& file) {
  std::vector<std::string> violations;
  if (absl::StartsWith(file.path, "base/")) return violations;
  const std::string code = CodeOnly(file.text);
  for (const BannedCall& call : BannedCalls()) {
    FindLines(file.path, code, call.pattern, "use " + call.instead, violations);
  }
  return violations;
}

// The patterns are put together so that this file does not find itself.
std::vector<std::string> CheckSwitchedOff(const SourceFile& file) {
  std::vector<std::string> violations;
  FindLines(file.path, file.text, R"(^\s*(//|/\*|\*).*\bTEST(_F|_P)?\s*\()", "commented-out test",
            violations);
  FindLines(file.path, file.text, absl::StrCat("DISABLED", "_\\w"), "switched-off test",
            violations);
  FindLines(file.path, file.text, absl::StrCat("GTEST", "_SKIP"), "skipped test", violations);
  FindLines(file.path, file.text, R"(^\s*#\s*if\s+0\b)", "code switched off", violations);
  return violations;
}

// `built`: every source of every target, as the configure step of this build listed them.
std::vector<std::string> CheckIsBuilt(const SourceFile& file,
                                      const absl::flat_hash_set<std::string>& built) {
  const bool is_source = absl::EndsWith(file.path, ".cc") || absl::EndsWith(file.path, ".cu");
  if (!is_source || built.contains(file.path)) return {};
  return {absl::StrCat(file.path, ": belongs to no target; name it in a CMakeLists.txt")};
}

template <typename Check>
void ExpectCleanTree(Check check) {
  std::vector<std::string> violations;
  for (const SourceFile& file : ReadSources()) {
    const std::vector<std::string> found = check(file);
    violations.insert(violations.end(), found.begin(), found.end());
  }
  EXPECT_TRUE(violations.empty()) << absl::StrJoin(violations, "\n");
}

// ---------------------------------------------------------------------------------------------------------------------
// The tree

TEST(Tidy, EveryPartIncludesOnlyWhatItMay) { ExpectCleanTree(CheckIncludes); }

TEST(Tidy, TimeChanceAndSleepComeFromBase) { ExpectCleanTree(CheckCalls); }

TEST(Tidy, NoTestIsSwitchedOff) { ExpectCleanTree(CheckSwitchedOff); }

TEST(Tidy, EverySourceAndTestBelongsToATarget) {
  const std::string list = *ReadFile(KVSWEEP_SOURCE_LIST, kSourceBytes);
  absl::flat_hash_set<std::string> built;
  for (const absl::string_view path : absl::StrSplit(list, '\n', absl::SkipEmpty())) {
    built.insert(std::filesystem::path(std::string(path))
                     .lexically_relative(std::filesystem::current_path()));
  }
  ExpectCleanTree([&](const SourceFile& file) { return CheckIsBuilt(file, built); });
}

// The digests in the README of the data are what others cite; they must be those of the files in
// the tree.
TEST(Tidy, DataFilesHaveTheDigestsOfTheirReadme) {
  const std::string readme = *ReadFile("experiments/data/README.md", kSourceBytes);
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator("experiments/data")) {
    const std::string name = entry.path().filename().string();
    if (name == "README.md") continue;
    const std::string digest = DigestFile(entry.path().string())->Hex();
    const bool has_row =
        std::regex_search(readme, std::regex(absl::StrCat("\\| ", name, " \\|.*", digest)));
    EXPECT_TRUE(has_row) << name << " " << digest;
    ++files;
  }
  EXPECT_GT(files, 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// The checks find what they are for

TEST(TidyChecks, FindForbiddenIncludes) {
  const auto count = [](const char* path, const char* text) {
    return CheckIncludes({path, text}).size();
  };
  EXPECT_EQ(count("coordinator/scheduler.cc", "#include \"storage/store.h\"\n"), 1u);
  EXPECT_EQ(count("coordinator/scheduler.cc", "#include <vector>\n#include \"base/ids.h\"\n"), 0u);
  EXPECT_EQ(count("coordinator/service.cc", "#include \"storage/store.h\"\n"), 0u);
  EXPECT_EQ(count("coordinator/service.cc", "#include \"worker/session.h\"\n"), 1u);
  EXPECT_EQ(count("worker/strategies/h2o.cc", "#include \"kernels/cpu/backend.h\"\n"), 1u);
  EXPECT_EQ(count("worker/strategies/h2o.cc", "#include <Eigen/SVD>\n"), 1u);
  EXPECT_EQ(count("worker/strategies/skewing.cc", "#include <Eigen/SVD>\n"), 0u);
  EXPECT_EQ(count("experiments/stats.cc", "#include <boost/math/distributions/students_t.hpp>\n"),
            0u);
  EXPECT_EQ(count("experiments/stats.cc", "#include <boost/asio.hpp>\n"), 1u);
  EXPECT_EQ(count("worker/daemon.cc", "  #  include <sqlite3.h>\n"), 1u);
  EXPECT_EQ(count("worker/daemon.cc", "#include \"worker/wire.h\"\n"), 0u);
  EXPECT_EQ(count("worker/daemon.cc", "#include \"worker/engine/engine.h\"\n"), 1u);
  EXPECT_EQ(count("worker/worker_main.cc", "#include <sqlite3.h>\n"), 0u);
  EXPECT_EQ(count("somewhere/else.cc", ""), 1u);
}

TEST(TidyChecks, FindBannedCallsInCodeAlone) {
  const auto count = [](const char* path, const char* text) {
    return CheckCalls({path, text}).size();
  };
  for (const char* call :
       {"auto t = std::chrono::steady_clock::now();", "absl::Now()", "time(nullptr)",
        "usleep (10);", "std::this_thread::sleep_for(1ms);", "int x = rand();", "std::mt19937 g;",
        "std::normal_distribution<> d;", "std::shuffle(a, b, g);"}) {
    EXPECT_EQ(count("worker/daemon.cc", call), 1u) << call;
    EXPECT_EQ(count("base/clock.cc", call), 0u) << call;
  }
  for (const char* fine : {"// absl::Now() is banned", "/* sleep(\n3) */", "\"rand()\"",
                           "operand()", "'\"'; x = \"absl::Now()\";", "R\"a(\" rand() )a\"",
                           "clock.SleepUntilNs(t);", "NextTime(0)"}) {
    EXPECT_EQ(count("worker/daemon.cc", fine), 0u) << fine;
  }
}

TEST(TidyChecks, FindSwitchedOffTests) {
  const auto count = [](const std::string& text) {
    return CheckSwitchedOff({"tests/x", text}).size();
  };
  EXPECT_EQ(count("// "
                  "TEST(A, B) {"),
            1u);
  EXPECT_EQ(count("TEST(A, DISABLED"
                  "_B) {"),
            1u);
  EXPECT_EQ(count("  GTEST"
                  "_SKIP();"),
            1u);
  EXPECT_EQ(count("#"
                  "if 0\n"),
            1u);
  EXPECT_EQ(count("TEST(A, B) {  // tests B"), 0u);
}

TEST(TidyChecks, FindFilesThatNoTargetNames) {
  const absl::flat_hash_set<std::string> built = {"tests/a/b_test.cc"};
  EXPECT_TRUE(CheckIsBuilt({"tests/a/b_test.cc", ""}, built).empty());
  EXPECT_TRUE(CheckIsBuilt({"base/only.h", ""}, built).empty());
  EXPECT_EQ(CheckIsBuilt({"tests/a/c_test.cc", ""}, built).size(), 1u);
  EXPECT_EQ(CheckIsBuilt({"kernels/cuda/softmax.cu", ""}, built).size(), 1u);
}

// ---------------------------------------------------------------------------------------------------------------------
// For people to judge; nothing fails

struct Length {
  size_t lines;
  std::string where;
};

void PrintLongest(const char* title, std::vector<Length> lengths, size_t count) {
  std::sort(lengths.begin(), lengths.end(),
            [](const Length& a, const Length& b) { return a.lines > b.lines; });
  std::cout << title << "\n";
  for (size_t i = 0; i < std::min(count, lengths.size()); ++i) {
    std::cout << "  " << lengths[i].lines << "  " << lengths[i].where << "\n";
  }
}

// Functions at namespace level as clang-format leaves them: from a line that begins in the first
// column and opens a block to the next line that is a closing brace in the first column.
void AddFunctionLengths(const SourceFile& file, std::vector<Length>& lengths) {
  std::optional<Length> open;
  for (const absl::string_view line : absl::StrSplit(file.text, '\n')) {
    if (open) ++open->lines;
    if (open && line == "}") lengths.push_back(*open);
    if (absl::StartsWith(line, "}")) open.reset();
    const bool begins =
        !line.empty() && line[0] != ' ' && line[0] != '}' && line[0] != '#' && line[0] != '/';
    if (begins && !absl::StartsWith(line, "namespace") && absl::StrContains(line, "(")) {
      open = Length{1, absl::StrCat(file.path, ": ", line.substr(0, 80))};
    }
  }
}

TEST(Tidy, PrintsTheLongestFunctionsAndFiles) {
  std::vector<Length> functions, files;
  for (const SourceFile& file : ReadSources()) {
    const auto lines = std::count(file.text.begin(), file.text.end(), '\n');
    files.push_back({static_cast<size_t>(lines), file.path});
    if (!absl::StartsWith(file.path, "tests/")) AddFunctionLengths(file, functions);
  }
  PrintLongest("longest functions (lines)", functions, 10);
  PrintLongest("longest files (lines)", files, 10);
  EXPECT_GT(files.size(), 20u);  // reading the tree from the wrong folder would pass everything
  EXPECT_GT(functions.size(), 20u);
}

}  // namespace
}  // namespace kvsweep
