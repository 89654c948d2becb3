// The one reflective walker over experiment.proto. It reads the `rule` of each field and serves
// every need that would otherwise be written by hand per field: reading YAML or JSON, validating
// what comes off the wire, setting a field by its dotted path, filling in defaults, printing for
// people, the canonical form, the reference of the spec and its JSON Schema. It knows types, units
// and ranges; what fields mean *together* is experiments/spec's.
//
// Texts come from outside: they are bounded before they are parsed (bytes, depth, nodes), aliases
// and anchors are refused, and everything wrong is reported at once, up to a bound, each with its
// place, value and remedy.
//
// All functions are pure (the environment comes in as a function) and may be called from many
// threads.
#ifndef KVSWEEP_PROTO_SCHEMA_H_
#define KVSWEEP_PROTO_SCHEMA_H_

#include <cstddef>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/message.h"

namespace kvsweep {

// ------------------------------------------------------------------------------------- problems

// A place in a text; line and column count from 1. Line 0: the place is not known.
struct TextPlace {
  int line = 0;
  int column = 0;
};

// One thing that is wrong with a message or the text it came from.
struct Problem {
  TextPlace place;
  std::string field;                 // dotted path, "arms.1.h2o.heavy_ratio"; empty: the whole text
  std::optional<std::string> value;  // as written
  std::string what;                  // what is wrong
  std::string remedy;                // what to do; may be empty
};

// "file:line:column: field: value "…": what; remedy", leaving out what is not there. Long values
// are shortened.
std::string FormatProblem(absl::string_view source, const Problem& problem);

// Where each field of a message was written, by dotted path.
class SourceMap {
 public:
  void Set(std::string path, TextPlace place) { places_[std::move(path)] = place; }

  // The place of `path`, or of the nearest field around it that was written.
  TextPlace Find(absl::string_view path) const;

 private:
  std::map<std::string, TextPlace> places_;
};

// A bounded list of problems; past the bound they are only counted.
class ProblemList {
 public:
  void Add(Problem problem);
  bool empty() const { return problems_.empty(); }
  const std::vector<Problem>& problems() const { return problems_; }

  // A copy in which every problem without a place has the place of its field.
  ProblemList Located(const SourceMap& places) const;

  // Ok, or InvalidArgument whose message is one line for each problem, in the order of the text.
  absl::Status ToStatus(absl::string_view source) const;

 private:
  std::vector<Problem> problems_;
  size_t dropped_ = 0;
};

// -------------------------------------------------------------------------------------- reading

// The value of an environment variable, if it is set.
using Environment = std::function<std::optional<std::string>(absl::string_view name)>;

struct ReadOptions {
  // For ${NAME} and ${NAME:default} inside values; without it every variable counts as unset.
  Environment environment;
};

// Reads YAML (or JSON, which is YAML) into `message`, which must be empty. Adds to `problems` what
// is wrong: unknown keys (with the nearest name), wrong types and units, values out of range,
// missing and doubled fields, fields that kvsweep sets itself. `places` (may be null) receives
// where each field was written. Fields that are not written stay unset; see ApplyDefaults. Returns
// whether no problem was added.
//
// An axis (rule `axes`) is written as a mapping from a dotted path to a list of values. Each value
// is read as the field that the path names and kept as text in base units (FormatCanonical). A
// message that holds nothing but axes speaks about the whole document, any other about itself.
bool ReadText(absl::string_view text, const ReadOptions& options,
              google::protobuf::Message* message, SourceMap* places, ProblemList* problems);

// ----------------------------------------------------------------------------- validating,
// defaults

// Checks a message that came off the wire by the same rules: ranges, required fields, known enum
// values, finite numbers, lengths of texts, counts, axes, no unknown fields. `prefix` goes before
// the field paths.
void CheckMessage(const google::protobuf::Message& message, absl::string_view prefix,
                  ProblemList* problems);

// As above, as a status: InvalidArgument naming each problem, `source` before each.
absl::Status ValidateMessage(const google::protobuf::Message& message, absl::string_view source);

// Sets every unset field that has a default, in `message` and in the messages that are present in
// it.
void ApplyDefaults(google::protobuf::Message* message);

// ------------------------------------------------------------------------------- fields by their
// path

// Resolves "load.arrivals.rate" from `root`. Only single fields, not lists, can be on the way; the
// last one must be a plain value. NotFound (with the nearest name) or InvalidArgument.
absl::StatusOr<const google::protobuf::FieldDescriptor*> FindField(
    const google::protobuf::Descriptor& root, absl::string_view path);

// Reads `text` as the field at `path` ("12MiB", "4/s", "recompute") and sets it, making the
// messages on the way. Errors as of FindField, or InvalidArgument for the value. For sweeps and `-S
// path=value`.
absl::Status SetField(google::protobuf::Message* message, absl::string_view path,
                      absl::string_view text);

// Reads `text` as a value of `field` and writes it in base units: the form in which axis values are
// kept.
absl::StatusOr<std::string> CanonicalValue(const google::protobuf::FieldDescriptor& field,
                                           absl::string_view text);

// A value (in any form that SetField takes) for people: "3MiB", "4/s", "500ms", "20%" stays as it
// is written. The text itself if it is not a value of the field.
std::string PrettyValue(const google::protobuf::FieldDescriptor& field, absl::string_view text);

// Names of the fields of `message` that hold an arm's strategy parameters (rule `strategy`), in
// order.
std::vector<std::string> StrategyNames(const google::protobuf::Descriptor& message);

// What the schema declares of the strategy whose parameters are field `name` of `message`; all
// false for a name that is none.
struct StrategyTraits {
  bool baseline = false;           // it has no rule of engagement
  bool history_dependent = false;  // preemption by recompute does not restore its state
};
StrategyTraits FindStrategyTraits(const google::protobuf::Descriptor& message,
                                  absl::string_view name);

// Whether the strategy whose parameters are field `name` of `message` moves entries over the host
// link (rule `host_tier`): always, or because one of its parameters says so; unset parameters have
// their defaults.
bool UsesHostLink(const google::protobuf::Message& message, absl::string_view name);

// A field that names a file or a model folder, and the value it has.
struct NamedPath {
  std::string field;  // dotted path
  std::string value;  // as written; never empty
  bool folder = false;
};

// All of them in `message`, values of axes included, in order of fields.
std::vector<NamedPath> FindNamedPaths(const google::protobuf::Message& message);

// ------------------------------------------------------------------------------------------
// printing

// JSON in one line: defaults, unset fields and empty messages omitted; base units; keys sorted;
// axes as a list in their order; bytes in hex. Two messages mean the same exactly if this is equal.
std::string CanonicalJson(const google::protobuf::Message& message);

// As a person would write it, with units, in the order of the schema. What is unset is left out.
std::string ToYaml(const google::protobuf::Message& message);

// The same as indented JSON.
std::string ToPrettyJson(const google::protobuf::Message& message);

// The reference: every field with type, unit, range, default and meaning. Markdown, one section for
// each message.
std::string ReferenceMarkdown(const google::protobuf::Descriptor& root);

// The same as aligned plain text for a terminal.
std::string ReferenceText(const google::protobuf::Descriptor& root);

// JSON Schema (draft 2020-12) for editors.
std::string JsonSchema(const google::protobuf::Descriptor& root);

}  // namespace kvsweep

#endif  // KVSWEEP_PROTO_SCHEMA_H_
