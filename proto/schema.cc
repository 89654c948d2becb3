// Problems, fields by their path, checking, defaults.
#include "proto/schema.h"

#include <algorithm>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/limits.h"
#include "base/status_macros.h"
#include "base/text.h"
#include "proto/schema_internal.h"

namespace kvsweep {

using namespace internal_schema;  // NOLINT: the walker's own parts

namespace {

constexpr size_t kMaxProblems = 50;
constexpr size_t kMaxShownValue = 60;

// Cuts at a character's border.
std::string Shorten(absl::string_view text) {
  if (text.size() <= kMaxShownValue) return std::string(text);
  size_t end = kMaxShownValue;
  while (end > 0 && (static_cast<uint8_t>(text[end]) & 0xC0) == 0x80) --end;
  return absl::StrCat(text.substr(0, end), "…");
}

// "a.b[2].c" -> "a.b[2]" -> "a.b" -> "a" -> "".
absl::string_view ParentPath(absl::string_view path) {
  const size_t end = path.find_last_of(".[");
  return end == absl::string_view::npos ? absl::string_view() : path.substr(0, end);
}

// Whether a field can be named by a dotted path and hold a value of an axis.
bool IsPlain(const FieldDescriptor& field) {
  return !field.is_repeated() && field.cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE &&
         !RuleOf(field).internal();
}

Problem UnknownField(const Descriptor& descriptor, absl::string_view name) {
  const std::vector<std::string> names = FieldNames(descriptor);
  const std::optional<std::string> nearest = NearestName(name, names);
  Problem problem;
  problem.what = "unknown field";
  problem.remedy = nearest ? absl::StrCat("did you mean \"", *nearest, "\"?")
                           : absl::StrCat("known are ", absl::StrJoin(names, ", "));
  return problem;
}

// Walks to the field that `path` names; fills `problem` when there is none.
const FieldDescriptor* Resolve(const Descriptor& root, absl::string_view path, Problem* problem) {
  const Descriptor* descriptor = &root;
  const std::vector<std::string> parts = absl::StrSplit(path, '.');
  for (size_t i = 0; i < parts.size(); ++i) {
    const FieldDescriptor* field = descriptor->FindFieldByName(parts[i]);
    if (field == nullptr || RuleOf(*field).internal()) {
      *problem = UnknownField(*descriptor, parts[i]);
      problem->what = absl::StrCat("\"", Shorten(parts[i]), "\" is an ", problem->what);
      return nullptr;
    }
    if (field->is_repeated()) {
      problem->what = absl::StrCat("\"", parts[i], "\" is a list, which a path cannot enter");
      problem->remedy = "name a field outside lists; arms[].grid varies a field inside an arm";
      return nullptr;
    }
    const bool last = i + 1 == parts.size();
    if (last && IsPlain(*field)) return field;
    if (last || IsPlain(*field)) {
      problem->what = last ? absl::StrCat("\"", parts[i], "\" is a group of fields, not a value")
                           : absl::StrCat("\"", parts[i], "\" is a value and has no fields");
      problem->remedy = last ? absl::StrCat("name one of its fields: ",
                                            absl::StrJoin(FieldNames(*field->message_type()), ", "))
                             : "end the path there";
      return nullptr;
    }
    descriptor = field->message_type();
  }
  return nullptr;
}

absl::Status ProblemStatus(absl::string_view field, const Problem& problem) {
  Problem named = problem;
  named.field = std::string(field);
  return absl::InvalidArgumentError(FormatProblem("", named));
}

// ------------------------------------------------------------------------------------ the wire

class Checker {
 public:
  Checker(const Descriptor& root, ProblemList* problems) : root_(root), problems_(*problems) {}

  void Check(const Message& message, const std::string& path) {
    const google::protobuf::Reflection& reflection = *message.GetReflection();
    if (!reflection.GetUnknownFields(message).empty()) {
      Report(path, "holds fields that this version does not know", "update kvsweep on both sides");
    }
    const Descriptor& descriptor = *message.GetDescriptor();
    for (int i = 0; i < descriptor.field_count(); ++i) {
      const FieldDescriptor& field = *descriptor.field(i);
      const std::string field_path = JoinPath(path, field.name());
      if (field.is_repeated()) {
        CheckList(message, field, field_path);
      } else if (field.has_presence() && !reflection.HasField(message, &field)) {
        if (RuleOf(field).required()) Report(field_path, "missing", Help(field));
      } else if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
        Check(reflection.GetMessage(message, &field), field_path);
      } else {
        CheckOne(field, GetValue(message, field), field_path);
      }
    }
  }

 private:
  static std::string Help(const FieldDescriptor& field) {
    return absl::StrCat("give it: ", RuleOf(field).help());
  }

  void Report(const std::string& path, std::string what, std::string remedy) {
    problems_.Add({.field = path, .what = std::move(what), .remedy = std::move(remedy)});
  }

  void CheckOne(const FieldDescriptor& field, const Value& value, const std::string& path) {
    Problem problem;
    if (CheckValue(field, value, &problem)) return;
    problem.field = path;
    if (field.type() != FieldDescriptor::TYPE_STRING) problem.value = PrettyText(field, value);
    problems_.Add(std::move(problem));
  }

  void CheckList(const Message& message, const FieldDescriptor& field, const std::string& path) {
    const int count = message.GetReflection()->FieldSize(message, &field);
    if (count == 0 && RuleOf(field).required()) Report(path, "missing", Help(field));
    if (count > limits::kContextTokens) {
      return Report(path, absl::StrCat(count, " entries"),
                    absl::StrCat("send at most ", limits::kContextTokens));
    }
    const bool axes = RuleOf(field).axes();
    if (axes && count > limits::kAxes) {
      return Report(path, absl::StrCat(count, " axes"),
                    absl::StrCat("name at most ", limits::kAxes));
    }
    if (axes) return CheckAxes(message, field, path);
    for (int i = 0; i < count; ++i) {
      const std::string entry = absl::StrCat(path, "[", i, "]");
      if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
        Check(message.GetReflection()->GetRepeatedMessage(message, &field, i), entry);
      } else {
        CheckOne(field, GetRepeatedValue(message, field, i), entry);
      }
    }
  }

  void CheckAxes(const Message& message, const FieldDescriptor& field, const std::string& path) {
    const Descriptor& owner = *message.GetDescriptor();
    const size_t before = problems_.problems().size();
    const std::vector<const Axis*> axes = AxesOf(message, field);
    std::set<std::string> seen;
    for (const Axis* axis : axes) {
      CheckAxis(*axis, HoldsOnlyAxes(owner) ? root_ : owner, path, RuleOf(field).together(), &seen);
    }
    Problem problem = {.field = path};
    const bool sound = problems_.problems().size() == before;
    if (sound && RuleOf(field).together() && !CheckTogether(axes, &problem)) {
      problems_.Add(std::move(problem));
    }
  }

  void CheckAxis(const Axis& axis, const Descriptor& target_root, const std::string& group,
                 bool may_repeat, std::set<std::string>* seen) {
    const std::string path = JoinPath(group, Shorten(axis.path()));
    Problem problem;
    const FieldDescriptor* target = Resolve(target_root, axis.path(), &problem);
    if (target == nullptr) return Report(path, problem.what, problem.remedy);
    if (!seen->insert(axis.path()).second) return Report(path, "named twice", "merge its values");
    if (axis.values().empty() || axis.values_size() > limits::kValuesPerAxis) {
      return Report(path, absl::StrCat(axis.values_size(), " values"),
                    absl::StrCat("give from 1 to ", limits::kValuesPerAxis));
    }
    std::set<std::string> values;
    for (const std::string& text : axis.values()) {
      Problem wrong = {.field = path, .value = text};
      const std::optional<Value> value = ParseValue(*target, text, &wrong);
      if (value && CanonicalText(*target, *value) != text) wrong.what = "not in base units";
      const bool fresh = values.insert(text).second || may_repeat;
      if (value && wrong.what.empty() && !fresh) wrong.what = "listed twice";
      if (!wrong.what.empty()) problems_.Add(std::move(wrong));
    }
  }

  const Descriptor& root_;
  ProblemList& problems_;
};

// Calls `visit` for each message inside `message`, itself first, with its path.
template <typename Visit>
void ForEachMessage(const Message& message, const std::string& path, const Visit& visit) {
  visit(message, path);
  const google::protobuf::Reflection& reflection = *message.GetReflection();
  for (int i = 0; i < message.GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor& field = *message.GetDescriptor()->field(i);
    if (field.cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) continue;
    const std::string field_path = JoinPath(path, field.name());
    if (field.is_repeated()) {
      for (int k = 0; k < reflection.FieldSize(message, &field); ++k) {
        ForEachMessage(reflection.GetRepeatedMessage(message, &field, k),
                       absl::StrCat(field_path, "[", k, "]"), visit);
      }
    } else if (reflection.HasField(message, &field)) {
      ForEachMessage(reflection.GetMessage(message, &field), field_path, visit);
    }
  }
}

}  // namespace

namespace internal_schema {

const FieldDescriptor* FindAxisTarget(const Descriptor& root, absl::string_view path,
                                      Problem* problem) {
  return Resolve(root, path, problem);
}

bool CheckTogether(const std::vector<const Axis*>& axes, Problem* problem) {
  if (axes.empty()) return true;
  const int count = axes.front()->values_size();
  for (const Axis* axis : axes) {
    if (axis->values_size() == count) continue;
    problem->what = absl::StrCat(axis->path(), " has ", axis->values_size(), " values and ",
                                 axes.front()->path(), " has ", count);
    problem->remedy = "axes that advance together need equally many";
    return false;
  }
  std::map<std::vector<std::string>, int> points;
  for (int i = 0; i < count; ++i) {
    std::vector<std::string> point;
    for (const Axis* axis : axes) point.push_back(axis->values(i));
    const auto [earlier, fresh] = points.emplace(std::move(point), i);
    if (fresh) continue;
    problem->what = absl::StrCat("points ", earlier->second + 1, " and ", i + 1, " are the same");
    problem->remedy = "remove one of them";
    return false;
  }
  return true;
}

std::vector<const Axis*> AxesOf(const Message& message, const FieldDescriptor& field) {
  const google::protobuf::Reflection& reflection = *message.GetReflection();
  std::vector<const Axis*> axes;
  for (int i = 0; i < reflection.FieldSize(message, &field); ++i) {
    axes.push_back(&static_cast<const Axis&>(reflection.GetRepeatedMessage(message, &field, i)));
  }
  return axes;
}

}  // namespace internal_schema

std::string FormatProblem(absl::string_view source, const Problem& problem) {
  std::string text(source);
  if (problem.place.line > 0) {
    absl::StrAppend(&text, ":", problem.place.line, ":", problem.place.column);
  }
  if (!text.empty()) absl::StrAppend(&text, ": ");
  if (!problem.field.empty()) absl::StrAppend(&text, problem.field, ": ");
  if (problem.value) absl::StrAppend(&text, "value \"", Shorten(*problem.value), "\": ");
  absl::StrAppend(&text, problem.what);
  if (!problem.remedy.empty()) absl::StrAppend(&text, "; ", problem.remedy);
  return text;
}

TextPlace SourceMap::Find(absl::string_view path) const {
  for (;; path = ParentPath(path)) {
    const auto found = places_.find(std::string(path));
    if (found != places_.end()) return found->second;
    if (path.empty()) return {};
  }
}

void ProblemList::Add(Problem problem) {
  if (problems_.size() >= kMaxProblems) {
    ++dropped_;
    return;
  }
  problems_.push_back(std::move(problem));
}

ProblemList ProblemList::Located(const SourceMap& places) const {
  ProblemList located = *this;
  for (Problem& problem : located.problems_) {
    if (problem.place.line == 0) problem.place = places.Find(problem.field);
  }
  return located;
}

absl::Status ProblemList::ToStatus(absl::string_view source) const {
  if (problems_.empty()) return absl::OkStatus();
  std::vector<const Problem*> ordered;
  for (const Problem& problem : problems_) ordered.push_back(&problem);
  const auto place = [](const Problem* p) { return std::pair(p->place.line, p->place.column); };
  std::stable_sort(ordered.begin(), ordered.end(),
                   [&](const Problem* a, const Problem* b) { return place(a) < place(b); });
  std::vector<std::string> lines;
  for (const Problem* problem : ordered) lines.push_back(FormatProblem(source, *problem));
  if (dropped_ > 0) lines.push_back(absl::StrCat("… and ", dropped_, " more"));
  return absl::InvalidArgumentError(absl::StrJoin(lines, "\n"));
}

void CheckMessage(const Message& message, absl::string_view prefix, ProblemList* problems) {
  Checker(*message.GetDescriptor(), problems).Check(message, std::string(prefix));
}

absl::Status ValidateMessage(const Message& message, absl::string_view source) {
  ProblemList problems;
  CheckMessage(message, "", &problems);
  return problems.ToStatus(source);
}

void ApplyDefaults(Message* message) {
  const google::protobuf::Reflection& reflection = *message->GetReflection();
  for (int i = 0; i < message->GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor& field = *message->GetDescriptor()->field(i);
    if (field.cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) {
      if (field.is_repeated() || !field.has_presence() || reflection.HasField(*message, &field)) {
        continue;
      }
      if (const std::optional<Value> value = DefaultOf(field)) SetValue(message, field, *value);
    } else if (field.is_repeated()) {
      for (int k = 0; k < reflection.FieldSize(*message, &field); ++k) {
        ApplyDefaults(reflection.MutableRepeatedMessage(message, &field, k));
      }
    } else if (reflection.HasField(*message, &field)) {
      ApplyDefaults(reflection.MutableMessage(message, &field));
    }
  }
}

absl::StatusOr<const FieldDescriptor*> FindField(const Descriptor& root, absl::string_view path) {
  Problem problem;
  const FieldDescriptor* field = Resolve(root, path, &problem);
  if (field == nullptr) return ProblemStatus(path, problem);
  return field;
}

absl::Status SetField(Message* message, absl::string_view path, absl::string_view text) {
  ASSIGN_OR_RETURN(const FieldDescriptor* field, FindField(*message->GetDescriptor(), path));
  Problem problem = {.value = std::string(text)};
  const std::optional<Value> value = ParseValue(*field, text, &problem);
  if (!value) return ProblemStatus(path, problem);

  Message* owner = message;
  const std::vector<std::string> parts = absl::StrSplit(path, '.');
  for (size_t i = 0; i + 1 < parts.size(); ++i) {
    const FieldDescriptor* step = owner->GetDescriptor()->FindFieldByName(parts[i]);
    owner = owner->GetReflection()->MutableMessage(owner, step);
  }
  SetValue(owner, *field, *value);
  return absl::OkStatus();
}

std::vector<std::string> StrategyNames(const Descriptor& message) {
  std::vector<std::string> names;
  for (int i = 0; i < message.field_count(); ++i) {
    if (RuleOf(*message.field(i)).strategy()) names.push_back(message.field(i)->name());
  }
  return names;
}

StrategyTraits FindStrategyTraits(const Descriptor& message, absl::string_view name) {
  const FieldDescriptor* const field = message.FindFieldByName(std::string(name));
  if (field == nullptr || !RuleOf(*field).strategy()) return {};
  return {.baseline = RuleOf(*field).baseline(),
          .history_dependent = RuleOf(*field).history_dependent()};
}

bool UsesHostLink(const Message& message, absl::string_view name) {
  const FieldDescriptor* const field = message.GetDescriptor()->FindFieldByName(std::string(name));
  if (field == nullptr || !RuleOf(*field).strategy()) return false;
  if (!RuleOf(*field).host_tier().empty()) return true;
  const Message& parameters = message.GetReflection()->GetMessage(message, field);
  const Descriptor& block = *parameters.GetDescriptor();
  for (int i = 0; i < block.field_count(); ++i) {
    const FieldDescriptor* const parameter = block.field(i);
    const Rule& rule = RuleOf(*parameter);
    if (rule.host_tier().empty()) continue;
    const bool set = parameters.GetReflection()->HasField(parameters, parameter);
    const std::string value =
        set ? EnumName(*parameters.GetReflection()->GetEnum(parameters, parameter))
            : rule.default_value();
    if (value == rule.host_tier()) return true;
  }
  return false;
}

std::vector<NamedPath> FindNamedPaths(const Message& root) {
  std::vector<NamedPath> paths;
  const auto add = [&](const FieldDescriptor& field, std::string path, std::string value) {
    const Rule& rule = RuleOf(field);
    if (!(rule.file() || rule.folder()) || value.empty()) return;
    paths.push_back({std::move(path), std::move(value), rule.folder()});
  };
  ForEachMessage(root, "", [&](const Message& message, const std::string& path) {
    const Descriptor& descriptor = *message.GetDescriptor();
    const google::protobuf::Reflection& reflection = *message.GetReflection();
    for (int i = 0; i < descriptor.field_count(); ++i) {
      const FieldDescriptor& field = *descriptor.field(i);
      if (RuleOf(field).axes()) {
        const Descriptor& target_root =
            HoldsOnlyAxes(descriptor) ? *root.GetDescriptor() : descriptor;
        for (const Axis& axis : reflection.GetRepeatedFieldRef<Axis>(message, &field)) {
          Problem problem;
          const FieldDescriptor* target = Resolve(target_root, axis.path(), &problem);
          if (target == nullptr) continue;
          for (const std::string& value : axis.values()) {
            add(*target, JoinPath(JoinPath(path, field.name()), axis.path()), value);
          }
        }
      } else if (IsPlain(field) && field.cpp_type() == FieldDescriptor::CPPTYPE_STRING) {
        add(field, JoinPath(path, field.name()), reflection.GetString(message, &field));
      }
    }
  });
  return paths;
}

}  // namespace kvsweep
