// `kvsweep generate`: one prompt under several arms, side by side.
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "cli/commands.h"
#include "cli/exit_code.h"
#include "cli/flags.h"
#include "experiments/matrix.h"
#include "experiments/spec.h"
#include "proto/runner.pb.h"
#include "proto/schema.h"
#include "worker/engine/shape_catalogue.h"
#include "worker/runner_choice.h"

namespace kvsweep {
namespace {

using Json = nlohmann::ordered_json;

constexpr char kSummary[] = "Continues (or scores) one prompt under several arms, side by side.";

constexpr char kMore[] =
    "MODEL is a model folder, or a shape of the catalogue (random weights, --prompt-ids only). "
    "Without --arm and --spec\n"
    "the arms are paged, h2o at 20 %, infinigen and streaming_llm at 20 %. Each arm runs alone, "
    "with ample memory unless\n"
    "a spec says otherwise. JSON: `tokens`, `nll` (nats, one a token) and `top_logits` of each "
    "arm; docs/CLI.md.\n"
    "\n"
    "Example:\n"
    "  kvsweep generate experiments/models/books-llama-14m \"Call me Ishmael.\" --tokens 48\n"
    "  kvsweep generate experiments/models/stories260K \"Once upon a time\" "
    "--arm full=paged --arm \"h2o-10=h2o{heavy_ratio: 0.05, recent_ratio: 0.05}\"\n"
    "  kvsweep generate MODEL --prompt-ids prompt.npy --score answer.npy --output json\n";

struct Flags {
  std::string model;
  std::string prompt;
  std::string prompt_file;
  std::string prompt_ids;
  std::string score;
  uint32_t tokens = 32;
  uint32_t top = 5;
  std::vector<std::string> arms;
  std::string spec;
  std::string calibration;
  std::string output = "text";
  std::string runner;
  uint32_t threads = 0;
};

// What every arm given by a flag is held to: a spec that holds nothing else of interest.
constexpr char kAroundArms[] =
    "\nschema_version: 1\n"
    "name: generate\n"
    "model: {shape: tiny-llama, weights: random}\n"
    "load: {arrivals: {process: burst, requests: 1}, lengths: {input: 1, output: 1}}\n"
    "kv: {device_bytes: 1GiB}\n"
    "engine: {batch_invariant: true}\n";

// One arm a line, so that a message's line number is the number of the flag. NAME=STRATEGY{...} or
// NAME=STRATEGY becomes an arm of a spec.
absl::StatusOr<std::string> ArmLines(const std::vector<std::string>& arms) {
  std::string text = "arms: [";
  for (const std::string& arm : arms) {
    const size_t equal = arm.find('=');
    if (equal == std::string::npos || equal == 0 || equal + 1 == arm.size()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "--arm ", arm, ": write NAME=STRATEGY or NAME=STRATEGY{parameter: value, ...}"));
    }
    const std::string name = arm.substr(0, equal);
    const std::string strategy = arm.substr(equal + 1, arm.find('{') - equal - 1);
    absl::StrAppend(&text, "{name: ", name, ", strategy: ", strategy);
    if (const size_t brace = arm.find('{'); brace != std::string::npos) {
      absl::StrAppend(&text, ", ", strategy, ": ", arm.substr(brace));
    }
    absl::StrAppend(&text, "},\n");
  }
  return text + "]";
}

absl::Status FillArms(const Flags& flags, GenerateRequest* request) {
  Experiment experiment;
  ResolvedInputs inputs;
  if (!flags.spec.empty()) {
    ASSIGN_OR_RETURN(LoadedExperiment loaded, LoadSpec({.path = flags.spec, .overrides = {}}));
    experiment = std::move(loaded.experiment);
    inputs = std::move(loaded.resolved);
    if (experiment.kv().has_device_bytes()) *request->mutable_kv() = experiment.kv();
    if (experiment.has_engine()) *request->mutable_engine() = experiment.engine();
  } else {
    std::vector<std::string> arms = flags.arms;
    if (arms.empty()) {
      arms = {"paged=paged", "h2o=h2o{heavy_ratio: 0.1, recent_ratio: 0.1}", "infinigen=infinigen",
              "streaming_llm=streaming_llm"};
    }
    ASSIGN_OR_RETURN(const std::string lines, ArmLines(arms));
    ASSIGN_OR_RETURN(experiment, ParseExperiment(lines + kAroundArms, "--arm", {}));
    *request->mutable_engine() = experiment.engine();
  }
  ASSIGN_OR_RETURN(const Matrix matrix, Matrix::Create(experiment, inputs.inputs));
  for (const Arm& arm : matrix.arms()) *request->add_arms() = arm;
  return absl::OkStatus();
}

absl::Status FillRequest(const Flags& flags, GenerateRequest* request) {
  std::error_code ignored;
  if (std::filesystem::is_directory(flags.model, ignored)) {
    request->mutable_model()->set_path(flags.model);
  } else if (flags.model.find('/') != std::string::npos) {
    return absl::NotFoundError(absl::StrCat("MODEL ", flags.model, ": no such folder"));
  } else {
    RETURN_IF_ERROR(FindShape(flags.model).status());
    if (!flags.prompt.empty() || !flags.prompt_file.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("MODEL ", flags.model,
                       " is a shape: random weights have no tokenizer; give token ids with "
                       "--prompt-ids, or a model folder"));
    }
    request->mutable_model()->set_shape(flags.model);
    request->mutable_model()->set_weights(Model::WEIGHTS_RANDOM);
  }
  if (!flags.prompt_file.empty()) {
    ASSIGN_OR_RETURN(std::string text, ReadFile(flags.prompt_file, limits::kTextFileBytes));
    request->set_prompt(std::move(text));
  } else if (!flags.prompt.empty()) {
    request->set_prompt(flags.prompt);
  } else if (flags.prompt_ids.empty() && flags.score.empty()) {
    return absl::InvalidArgumentError(
        "give a prompt: a text, --prompt-file, --prompt-ids or "
        "--score");
  }
  request->set_prompt_ids_file(flags.prompt_ids);
  request->set_score_ids_file(flags.score);
  request->set_calibration_file(flags.calibration);
  request->set_max_tokens(flags.tokens);
  request->set_top_logits(flags.top);
  RETURN_IF_ERROR(FillArms(flags, request));
  ApplyDefaults(request->mutable_engine());
  ApplyDefaults(request->mutable_model());
  return absl::OkStatus();
}

absl::Status RunChild(const std::vector<std::string>& command) {
  std::vector<char*> arguments;
  for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  pid_t child = 0;
  if (posix_spawn(&child, arguments[0], nullptr, nullptr, arguments.data(), environ) != 0) {
    return absl::UnavailableError(absl::StrCat(
        command[0], " is not a program; build kvsweep-runner, or name it with --runner"));
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat(
      command[0], WIFSIGNALED(status) ? absl::StrCat(" was ended by signal ", WTERMSIG(status))
                                      : " failed; its reason stands above"));
}

absl::StatusOr<GenerateReply> Ask(const Flags& flags, const GenerateRequest& request) {
  const TempDir folder;
  const std::string path = folder.Join("request");
  RETURN_IF_ERROR(WriteFileAtomic(path, request.SerializeAsString()));
  std::vector<std::string> command = {
      flags.runner.empty() ? ChooseRunner(ProgramFolder(), RealClock::Get()).path : flags.runner,
      "--generate", path, "--threads", absl::StrCat(flags.threads)};
  RETURN_IF_ERROR(RunChild(command));
  ASSIGN_OR_RETURN(const std::string bytes, ReadFile(path + ".reply", int64_t{1} << 30));
  GenerateReply reply;
  if (!reply.ParseFromString(bytes)) return absl::DataLossError("the runner's reply is damaged");
  if (reply.status_code() == 0) return reply;
  const auto code = static_cast<absl::StatusCode>(reply.status_code());
  // The runner was reached, and what it was given is damaged or not supported: the asker's to mend.
  const bool refused =
      code == absl::StatusCode::kUnimplemented || code == absl::StatusCode::kDataLoss;
  return absl::Status(refused ? absl::StatusCode::kInvalidArgument : code, reply.status_message());
}

double MeanNll(const GeneratedArm& arm) {
  if (arm.nll().empty()) return 0;
  return std::accumulate(arm.nll().begin(), arm.nll().end(), 0.0) / arm.nll_size();
}

// The first token that differs from the reference's; as many as there are: none does.
int FirstDifference(const GeneratedArm& arm, const GeneratedArm& reference) {
  int index = 0;
  while (index < arm.tokens_size() && index < reference.tokens_size() &&
         arm.tokens(index) == reference.tokens(index)) {
    ++index;
  }
  return index;
}

Json ToJson(const Flags& flags, const GenerateReply& reply) {
  Json json;
  json["model"] = flags.model;
  json["prompt"] = reply.prompt();
  if (!reply.prompt_text().empty()) json["prompt_text"] = reply.prompt_text();
  json["arms"] = Json::array();
  for (const GeneratedArm& arm : reply.arms()) {
    Json entry;
    entry["arm"] = arm.arm();
    entry["strategy"] = arm.strategy();
    if (!arm.error().empty()) {
      entry["error"] = arm.error();
    } else {
      entry["tokens"] = arm.tokens();
      if (!arm.text().empty()) entry["text"] = arm.text();
      entry["nll"] = arm.nll();
      entry["mean_nll"] = MeanNll(arm);
      entry["attended_fraction"] = arm.attended_fraction();
      entry["top_logits"] = Json::array();
      for (const TopLogits& top : arm.top_logits()) {
        Json place = Json::array();
        for (int i = 0; i < top.tokens_size(); ++i) {
          place.push_back({{"token", top.tokens(i)}, {"logit", top.logits(i)}});
        }
        entry["top_logits"].push_back(std::move(place));
      }
    }
    json["arms"].push_back(std::move(entry));
  }
  return json;
}

// The tokens as far as they have no text.
std::string Shown(const std::string& text, const google::protobuf::RepeatedField<int32_t>& tokens) {
  if (!text.empty()) return text;
  std::string ids;
  for (const int32_t token : tokens) absl::StrAppend(&ids, ids.empty() ? "" : " ", token);
  return ids;
}

void Print(const std::string& title, absl::string_view text) {
  std::string indented;
  for (const char c : text) {
    indented += c;
    if (c == '\n') indented += "  ";
  }
  std::printf("\n%s\n  %s\n", title.c_str(), indented.c_str());
}

void PrintText(const Flags& flags, const GenerateReply& reply) {
  const bool scores = !flags.score.empty();
  // The first that could run.
  const auto able = std::find_if(reply.arms().begin(), reply.arms().end(),
                                 [](const GeneratedArm& arm) { return arm.error().empty(); });
  const GeneratedArm& reference = able == reply.arms().end() ? reply.arms(0) : *able;
  std::printf("%-16s %9s %9s  %s\n", "arm", "mean nll", "attended",
              scores ? "most surprising token" : "first other token");
  for (const GeneratedArm& arm : reply.arms()) {
    if (!arm.error().empty()) {
      std::printf("%-16s cannot run: %s\n", arm.arm().c_str(), arm.error().c_str());
      continue;
    }
    std::string last = "-";
    if (scores) {
      const auto worst = std::max_element(arm.nll().begin(), arm.nll().end());
      last = absl::StrFormat("%d (nll %.3f)", worst - arm.nll().begin() + 1, *worst);
    } else if (const int at = FirstDifference(arm, reference); at < arm.tokens_size()) {
      last = absl::StrFormat("%d of %d", at + 1, arm.tokens_size());
    } else if (&arm != &reference) {
      last = "none";
    }
    std::printf("%-16s %9.4f %8.1f%%  %s\n", arm.arm().c_str(), MeanNll(arm),
                100 * arm.attended_fraction(), last.c_str());
  }
  Print("prompt", Shown(reply.prompt_text(), reply.prompt()));
  for (const GeneratedArm& arm : reply.arms()) {
    if (!arm.error().empty()) continue;
    Print(scores ? "scored" : arm.arm(), Shown(arm.text(), arm.tokens()));
    if (scores) break;  // the same for all
  }
}

absl::Status GenerateSideBySide(const Flags& flags) {
  GenerateRequest request;
  RETURN_IF_ERROR(FillRequest(flags, &request));
  ASSIGN_OR_RETURN(const GenerateReply reply, Ask(flags, request));
  if (flags.output == "json") {
    const std::string text =
        ToJson(flags, reply).dump(1, ' ', false, Json::error_handler_t::replace);
    std::printf("%s\n", text.c_str());
  } else {
    PrintText(flags, reply);
  }
  for (const GeneratedArm& arm : reply.arms()) {
    if (arm.error().empty()) return absl::OkStatus();
  }
  return absl::InvalidArgumentError("no arm could run");
}

int Run(const Flags& flags) {
  const absl::Status status = GenerateSideBySide(flags);
  return status.ok() ? kExitOk : Fail(status);
}

}  // namespace

void AddGenerateCommand(CLI::App& app, int* exit_code) {
  CLI::App* command = AddCommand(app, "generate", kSummary, kMore);
  auto flags = std::make_shared<Flags>();
  command->add_option("MODEL", flags->model, "Model folder, or the name of a shape")->required();
  CLI::Option* prompt = command->add_option("PROMPT", flags->prompt, "The text to continue");
  CLI::Option* file = command->add_option("--prompt-file", flags->prompt_file, "A file with it");
  CLI::Option* ids = command->add_option(
      "--prompt-ids", flags->prompt_ids,
      "A file with its token ids instead: .npy, .u16, or numbers as text or JSON list");
  prompt->excludes(file)->excludes(ids);
  file->excludes(ids);
  CLI::Option* tokens = command->add_option("-n,--tokens", flags->tokens, "Tokens to generate")
                            ->check(CLI::Range(1, 1 << 20))
                            ->capture_default_str();
  command
      ->add_option("--score", flags->score,
                   "Score the token ids of this file behind the prompt instead (without a prompt, "
                   "all but the first)")
      ->type_name("FILE")
      ->excludes(tokens);
  CLI::Option* arms =
      command
          ->add_option("--arm", flags->arms,
                       "NAME=STRATEGY or NAME=STRATEGY{parameter: value, ...}; repeatable")
          ->allow_extra_args(false)
          ->type_name("ARM");
  command->add_option("--spec", flags->spec, "Take arms, memory and engine from this experiment")
      ->type_name("SPEC")
      ->excludes(arms);
  command
      ->add_option("--calibration", flags->calibration,
                   "Text or token ids that infinigen computes its skewing from; by default random "
                   "ids")
      ->type_name("FILE");
  command->add_option("--top", flags->top, "Largest logits kept of each position (JSON)")
      ->check(CLI::Range(0, 1000))
      ->capture_default_str();
  command->add_option("-o,--output", flags->output, "text or json")
      ->check(CLI::IsMember({"text", "json"}))
      ->type_name("FORMAT")
      ->capture_default_str();
  command->add_option("--runner", flags->runner,
                      "The runner program; by default kvsweep-runner beside this program");
  command->add_option("--threads", flags->threads, "CPU threads of the runner; 0: one a core")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  command->callback([flags, exit_code] { *exit_code = Run(*flags); });
}

}  // namespace kvsweep
