// `kvsweep spec`: what an experiment is written in.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>

#include "cli/commands.h"
#include "cli/exit_code.h"
#include "cli/flags.h"
#include "experiments/metrics.h"
#include "proto/experiment.pb.h"
#include "proto/schema.h"

namespace kvsweep {
namespace {

constexpr char kSummary[] =
    "Prints the reference of the spec: every field with type, unit, range, default and meaning.";

constexpr char kMore[] =
    "Example:\n"
    "  kvsweep spec | less\n"
    "  kvsweep spec --json-schema > kvsweep.schema.json   # for editors\n";

struct Flags {
  bool json_schema = false;
  bool markdown = false;
  bool metrics = false;
};

int Run(const Flags& flags) {
  const google::protobuf::Descriptor& root = *Experiment::descriptor();
  std::string text;
  if (flags.metrics) {
    text = MetricsMarkdown();
  } else if (flags.json_schema) {
    text = JsonSchema(root);
  } else {
    text = flags.markdown ? ReferenceMarkdown(root) : ReferenceText(root);
  }
  std::printf("%s%s", text.c_str(), text.empty() || text.back() != '\n' ? "\n" : "");
  return kExitOk;
}

}  // namespace

void AddSpecCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = AddCommand(app, "spec", kSummary, kMore);
  auto flags = std::make_shared<Flags>();
  // Said in our own words: the library would list them in the order of their addresses.
  CLI::Option* schema =
      command->add_flag("--json-schema", flags->json_schema, "As JSON Schema (draft 2020-12)")
          ->option_text("Excludes: --markdown --metrics");
  CLI::Option* markdown = command->add_flag("--markdown", flags->markdown, "As Markdown")
                              ->option_text("Excludes: --json-schema --metrics");
  command->add_flag("--metrics", flags->metrics, "The metrics of a trial instead: unit and formula")
      ->option_text("Excludes: --json-schema --markdown")
      ->excludes(schema)
      ->excludes(markdown);
  schema->excludes(markdown);
  command->callback([flags, exit_code] { *exit_code = Run(*flags); });
}

}  // namespace kvsweep
