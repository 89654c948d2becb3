// kvsweep: the command line. See cli/commands.h.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/text.h"
#include "base/version.h"
#include "cli/commands.h"
#include "cli/exit_code.h"

namespace kvsweep {
namespace {

constexpr char kDescription[] =
    "Compares KV-cache strategies: which one wins, where, by how much, how sure, at what cost in "
    "quality.";

constexpr char kExample[] =
    "Example:\n"
    "  kvsweep run experiments/specs/quickstart.yaml     # everything on this machine\n"
    "  kvsweep compare                                   # the comparison again\n"
    "`kvsweep COMMAND --help` has an example for each command.\n";

std::string VersionText() {
  const BuildInfo& build = GetBuildInfo();
  return absl::StrCat("kvsweep ", build.version, " (", build.commit, ")\n", build.compiler, ", ",
                      build.flags, "\nrunner build ", build.runner_digest);
}

std::vector<std::string> CommandNames(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands({})) names.push_back(command->get_name());
  return names;
}

int FailUnknownCommand(const std::string& name, const std::vector<std::string>& names) {
  const std::optional<std::string> nearest = NearestName(name, names);
  return Fail(absl::InvalidArgumentError(
      absl::StrCat("unknown command \"", name, "\"",
                   nearest ? absl::StrCat("; did you mean \"", *nearest, "\"?")
                           : std::string("; `kvsweep --help` lists them"))));
}

int Main(int argc, char** argv) {
  CLI::App app(kDescription, "kvsweep");
  app.footer(std::string(kExample) + "\n" + kExitCodesHelp);
  app.set_version_flag("--version", VersionText());
  app.require_subcommand(1);
  int exit_code = kExitUsage;
  AddRunCommand(app, &exit_code);
  AddCompareCommand(app, &exit_code);
  AddSpecCommand(app, &exit_code);
  AddValidateCommand(app, &exit_code);
  AddExpandCommand(app, &exit_code);
  AddGenerateCommand(app, &exit_code);
  AddListCommand(app, &exit_code);
  AddShowCommand(app, &exit_code);
  AddLogsCommand(app, &exit_code);
  AddQueryCommand(app, &exit_code);
  AddSubmitCommand(app, &exit_code);
  AddWatchCommand(app, &exit_code);
  AddCancelCommand(app, &exit_code);
  AddWorkersCommand(app, &exit_code);
  if (argc < 2) {
    std::fputs(app.help().c_str(), stderr);
    return kExitUsage;
  }
  const std::vector<std::string> names = CommandNames(app);
  if (argv[1][0] != '-' && !absl::c_linear_search(names, argv[1])) {
    return FailUnknownCommand(argv[1], names);
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    // 0 is --help and --version; the library's other codes are all one to us.
    return app.exit(error) == 0 ? kExitOk : kExitUsage;
  }
  // A full disk must not pass as a whole answer.
  if ((std::fflush(stdout) != 0 || std::ferror(stdout) != 0) && exit_code == kExitOk) {
    std::fprintf(stderr, "kvsweep: the output could not be written\n");
    return kExitFailed;
  }
  return exit_code;
}

}  // namespace
}  // namespace kvsweep

int main(int argc, char** argv) { return kvsweep::Main(argc, argv); }
