// YAML and JSON to messages. The parser's events build a small bounded tree of our own (yaml-cpp's
// nodes would share aliases and drop doubled keys); the walker then reads the tree against the
// schema.
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <map>
#include <set>
#include <sstream>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/limits.h"
#include "base/text.h"
#include "proto/schema.h"
#include "proto/schema_internal.h"

namespace kvsweep {

using namespace internal_schema;  // NOLINT: the walker's own parts

namespace {

constexpr size_t kMaxNodes = 200'000;

struct Node {
  enum class Kind { kNull, kText, kList, kMap };
  Kind kind = Kind::kNull;
  TextPlace place;
  std::string text;                                     // kText
  std::vector<Node> items;                              // kList; values of kMap
  std::vector<std::pair<std::string, TextPlace>> keys;  // kMap, beside items
};

// Thrown through the parser, caught below: the events have no other way to stop it.
struct Refused {
  Problem problem;
};

// Builds the tree from the events of one document.
class TreeBuilder final : public YAML::EventHandler {
 public:
  Node root;
  bool has_root = false;

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    Add(mark, "", anchor, Node::Kind::kNull, "");
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    Refuse(mark, "aliases (*name) are refused", "write the value again");
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    Add(mark, tag, anchor, Node::Kind::kText, value);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    Open(Add(mark, tag, anchor, Node::Kind::kList, ""), mark);
  }
  void OnSequenceEnd() override { open_.pop_back(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    Open(Add(mark, tag, anchor, Node::Kind::kMap, ""), mark);
  }
  void OnMapEnd() override { open_.pop_back(); }

 private:
  // A list or map whose end has not come. In a map, a key may be waiting for its value.
  struct OpenNode {
    Node* node;
    bool has_key = false;
  };

  [[noreturn]] static void Refuse(const YAML::Mark& mark, std::string what, std::string remedy) {
    throw Refused{{.place = Place(mark), .what = std::move(what), .remedy = std::move(remedy)}};
  }

  static TextPlace Place(const YAML::Mark& mark) { return {mark.line + 1, mark.column + 1}; }

  void Open(Node* node, const YAML::Mark& mark) {
    if (open_.size() >= limits::kSpecNestingDepth) {
      Refuse(mark, absl::StrCat("nested deeper than ", limits::kSpecNestingDepth, " levels"),
             "a spec needs no more than eight");
    }
    open_.push_back({node});
  }

  Node* Add(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor, Node::Kind kind,
            const std::string& text) {
    if (anchor != 0) Refuse(mark, "anchors (&name) are refused", "remove it");
    if (!(tag.empty() || tag == "?" || tag == "!")) {
      Refuse(mark, absl::StrCat("tags (", tag, ") are refused"), "remove it");
    }
    if (++count_ > kMaxNodes) Refuse(mark, absl::StrCat("more than ", kMaxNodes, " entries"), "");
    if (open_.empty()) {
      has_root = true;
      return Fill(&root, mark, kind, text);
    }
    OpenNode& parent = open_.back();
    if (parent.node->kind == Node::Kind::kMap && !parent.has_key) {
      if (kind != Node::Kind::kText) Refuse(mark, "a key must be a plain name", "");
      parent.node->keys.emplace_back(text, Place(mark));
      parent.has_key = true;
      return nullptr;
    }
    parent.has_key = false;
    return Fill(&parent.node->items.emplace_back(), mark, kind, text);
  }

  static Node* Fill(Node* node, const YAML::Mark& mark, Node::Kind kind, const std::string& text) {
    node->kind = kind;
    node->place = Place(mark);
    node->text = text;
    return node;
  }

  // Pointers stay valid: only the innermost open node grows, and its items are closed.
  std::vector<OpenNode> open_;
  size_t count_ = 0;
};

bool ParseTree(absl::string_view text, Node* root, ProblemList* problems) {
  Problem problem;
  try {
    std::istringstream stream{std::string(text)};
    YAML::Parser parser(stream);
    TreeBuilder builder;
    parser.HandleNextDocument(builder);
    TreeBuilder rest;
    if (parser.HandleNextDocument(rest) && rest.has_root) {
      problem = {
          .place = rest.root.place, .what = "a second document", .remedy = "write one spec a file"};
    } else {
      *root = std::move(builder.root);
      return true;
    }
  } catch (const Refused& refused) {
    problem = refused.problem;
  } catch (const YAML::Exception& error) {
    const bool variable = absl::StrContains(text, "${");
    problem = {.place = {error.mark.line + 1, error.mark.column + 1},
               .what = absl::StrCat("not valid YAML: ", error.msg),
               .remedy = variable ? "inside { } and [ ] quote variables: \"${NAME}\""
                                  : "check indentation, colons and quotes there"};
  }
  problems->Add(std::move(problem));
  return false;
}

absl::string_view KindName(Node::Kind kind) {
  switch (kind) {
    case Node::Kind::kNull:
      return "nothing";
    case Node::Kind::kText:
      return "a single value";
    case Node::Kind::kList:
      return "a list";
    case Node::Kind::kMap:
      return "a mapping";
  }
  return "";
}

class Reader {
 public:
  Reader(const Descriptor& root, const ReadOptions& options, SourceMap* places,
         ProblemList* problems)
      : root_(root), options_(options), places_(*places), problems_(*problems) {}

  void ReadMessage(const Node& node, const std::string& path, Message* message) {
    if (node.kind == Node::Kind::kNull && !path.empty()) {  // "paged:" means all defaults
      return ReportMissing(*message->GetDescriptor(), {}, node.place, path);
    }
    if (node.kind != Node::Kind::kMap) {
      return Report(node.place, path, std::nullopt,
                    absl::StrCat("is ", KindName(node.kind), ", not a mapping"),
                    absl::StrCat("write fields: ",
                                 absl::StrJoin(FieldNames(*message->GetDescriptor()), ", ")));
    }
    std::set<std::string> seen;
    for (size_t i = 0; i < node.keys.size(); ++i) {
      const auto& [key, place] = node.keys[i];
      const FieldDescriptor* field = message->GetDescriptor()->FindFieldByName(key);
      const std::string field_path = JoinPath(path, key);
      if (field == nullptr) {
        ReportUnknown(*message->GetDescriptor(), key, place, field_path);
      } else if (RuleOf(*field).internal()) {
        Report(place, field_path, std::nullopt, "is set by kvsweep itself", "remove it");
      } else if (!seen.insert(key).second) {
        Report(place, field_path, std::nullopt, "written twice", "keep one of them");
      } else {
        places_.Set(field_path, node.items[i].place);
        ReadField(node.items[i], *field, field_path, message);
      }
    }
    ReportMissing(*message->GetDescriptor(), seen, node.place, path);
  }

 private:
  void Report(TextPlace place, const std::string& path, std::optional<std::string> value,
              std::string what, std::string remedy) {
    problems_.Add({place, path, std::move(value), std::move(what), std::move(remedy)});
  }

  void ReportUnknown(const Descriptor& descriptor, const std::string& key, TextPlace place,
                     const std::string& path) {
    const std::vector<std::string> names = FieldNames(descriptor);
    const std::optional<std::string> nearest = NearestName(key, names);
    Report(place, path, std::nullopt, "unknown field",
           nearest ? absl::StrCat("did you mean \"", *nearest, "\"?")
                   : absl::StrCat("known are ", absl::StrJoin(names, ", ")));
  }

  void ReportMissing(const Descriptor& descriptor, const std::set<std::string>& seen,
                     TextPlace place, const std::string& path) {
    for (int i = 0; i < descriptor.field_count(); ++i) {
      const FieldDescriptor& field = *descriptor.field(i);
      if (!RuleOf(field).required() || seen.contains(field.name())) continue;
      Report(place, JoinPath(path, field.name()), std::nullopt, "missing",
             absl::StrCat("give it: ", RuleOf(field).help()));
    }
  }

  void ReadField(const Node& node, const FieldDescriptor& field, const std::string& path,
                 Message* message) {
    const google::protobuf::Reflection& reflection = *message->GetReflection();
    if (RuleOf(field).axes()) return ReadAxes(node, field, path, message);
    if (field.is_repeated()) return ReadList(node, field, path, message);
    if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      return ReadMessage(node, path, reflection.MutableMessage(message, &field));
    }
    if (const std::optional<Value> value = ReadValue(node, field, path)) {
      SetValue(message, field, *value);
    }
  }

  void ReadList(const Node& node, const FieldDescriptor& field, const std::string& path,
                Message* message) {
    if (node.kind != Node::Kind::kList) {
      return Report(node.place, path, std::nullopt,
                    absl::StrCat("is ", KindName(node.kind), ", not a list"),
                    field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE
                        ? "write entries as \"- {…}\""
                        : "write its values as \"[value, value]\"");
    }
    if (node.items.size() > limits::kArms) {
      return Report(node.place, path, std::nullopt, absl::StrCat(node.items.size(), " entries"),
                    absl::StrCat("write at most ", limits::kArms));
    }
    if (node.items.empty() && RuleOf(field).required()) {
      return Report(node.place, path, std::nullopt, "empty list", "write at least one entry");
    }
    for (size_t i = 0; i < node.items.size(); ++i) {
      const std::string entry = absl::StrCat(path, "[", i, "]");
      places_.Set(entry, node.items[i].place);
      if (field.cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) {
        if (const std::optional<Value> value = ReadValue(node.items[i], field, entry)) {
          AddRepeatedValue(message, field, *value);
        }
        continue;
      }
      if (node.items[i].kind == Node::Kind::kNull) {
        Report(node.items[i].place, entry, std::nullopt, "empty entry",
               "write its fields or remove it");
        continue;
      }
      ReadMessage(node.items[i], entry, message->GetReflection()->AddMessage(message, &field));
    }
  }

  void ReadAxes(const Node& node, const FieldDescriptor& field, const std::string& path,
                Message* message) {
    const size_t before = problems_.problems().size();
    if (RuleOf(field).points()) {
      ReadPoints(node, field, path, message);
    } else {
      ReadAxisMap(node, field, path, message);
    }
    Problem problem = {.place = node.place, .field = path};
    const bool sound = problems_.problems().size() == before;
    if (sound && RuleOf(field).together() && !CheckTogether(AxesOf(*message, field), &problem)) {
      problems_.Add(std::move(problem));
    }
  }

  // A new axis for `key`, whose field goes to `target`; null if it names none.
  Axis* AddAxis(const std::string& key, TextPlace place, const FieldDescriptor& field,
                const std::string& axis_path, Message* message, const FieldDescriptor** target) {
    places_.Set(axis_path, place);
    const Descriptor& owner = *message->GetDescriptor();
    Problem problem;
    *target = FindAxisTarget(HoldsOnlyAxes(owner) ? root_ : owner, key, &problem);
    if (*target == nullptr) {
      Report(place, axis_path, std::nullopt, problem.what, problem.remedy);
      return nullptr;
    }
    auto* axis = static_cast<Axis*>(message->GetReflection()->AddMessage(message, &field));
    axis->set_path(key);
    return axis;
  }

  // "- {path: value, path: value}": the paths of the first point are the axes, each point gives
  // each of them a value.
  void ReadPoints(const Node& node, const FieldDescriptor& field, const std::string& path,
                  Message* message) {
    constexpr char kForm[] = "write points as \"- {path.of.field: value}\"";
    if (node.kind != Node::Kind::kList || node.items.empty()) {
      return Report(node.place, path, std::nullopt,
                    node.kind == Node::Kind::kList
                        ? "empty list"
                        : absl::StrCat("is ", KindName(node.kind), ", not a list"),
                    kForm);
    }
    if (node.items.size() > limits::kValuesPerAxis) {
      return Report(node.place, path, std::nullopt, absl::StrCat(node.items.size(), " points"),
                    absl::StrCat("write at most ", limits::kValuesPerAxis));
    }
    struct Column {
      Axis* axis;
      const FieldDescriptor* target;
    };
    std::map<std::string, Column> columns;
    for (size_t i = 0; i < node.items.size(); ++i) {
      const Node& point = node.items[i];
      const std::string point_path = absl::StrCat(path, "[", i, "]");
      if (point.kind != Node::Kind::kMap || point.keys.empty()) {
        return Report(point.place, point_path, std::nullopt,
                      point.kind == Node::Kind::kMap
                          ? "names no field"
                          : absl::StrCat("is ", KindName(point.kind), ", not a mapping"),
                      kForm);
      }
      if (point.keys.size() > limits::kAxes) {
        return Report(point.place, point_path, std::nullopt,
                      absl::StrCat(point.keys.size(), " fields"),
                      absl::StrCat("name at most ", limits::kAxes));
      }
      std::set<std::string> seen;
      for (size_t k = 0; k < point.keys.size(); ++k) {
        const auto& [key, place] = point.keys[k];
        const std::string axis_path = JoinPath(path, key);
        if (!seen.insert(key).second) {
          return Report(place, axis_path, std::nullopt, "written twice", "keep one of them");
        }
        if (i == 0) {
          Column column = {};
          column.axis = AddAxis(key, place, field, axis_path, message, &column.target);
          if (column.axis == nullptr) return;
          columns[key] = column;
        }
        const auto column = columns.find(key);
        if (column == columns.end()) {
          return Report(place, point_path, std::nullopt,
                        absl::StrCat("names ", key, ", which the first point does not"),
                        "name the same fields in all points");
        }
        if (const std::optional<Value> value =
                ReadValue(point.items[k], *column->second.target, axis_path)) {
          column->second.axis->add_values(CanonicalText(*column->second.target, *value));
        }
      }
      for (const auto& [key, column] : columns) {
        if (seen.contains(key)) continue;
        return Report(point.place, point_path, std::nullopt, absl::StrCat("lacks ", key),
                      "name the same fields in all points");
      }
    }
  }

  void ReadAxisMap(const Node& node, const FieldDescriptor& field, const std::string& path,
                   Message* message) {
    if (node.kind != Node::Kind::kMap) {
      return Report(node.place, path, std::nullopt,
                    absl::StrCat("is ", KindName(node.kind), ", not a mapping"),
                    "write axes as \"path.of.field: [value, value]\"");
    }
    if (node.items.size() > limits::kAxes) {
      return Report(node.place, path, std::nullopt, absl::StrCat(node.items.size(), " axes"),
                    absl::StrCat("write at most ", limits::kAxes));
    }
    std::set<std::string> seen;
    for (size_t i = 0; i < node.items.size(); ++i) {
      const auto& [key, place] = node.keys[i];
      const std::string axis_path = JoinPath(path, key);
      if (!seen.insert(key).second) {
        Report(place, axis_path, std::nullopt, "written twice", "merge its values");
        continue;
      }
      const FieldDescriptor* target = nullptr;
      if (Axis* axis = AddAxis(key, place, field, axis_path, message, &target)) {
        ReadAxisValues(node.items[i], *target, axis_path, RuleOf(field).together(), axis);
      }
    }
  }

  void ReadAxisValues(const Node& node, const FieldDescriptor& target, const std::string& path,
                      bool may_repeat, Axis* axis) {
    if (node.kind != Node::Kind::kList || node.items.empty()) {
      return Report(node.place, path, std::nullopt,
                    node.items.empty() && node.kind == Node::Kind::kList
                        ? "empty list"
                        : absl::StrCat("is ", KindName(node.kind), ", not a list"),
                    "write its values as \"[value, value]\"");
    }
    if (node.items.size() > limits::kValuesPerAxis) {
      return Report(node.place, path, std::nullopt, absl::StrCat(node.items.size(), " values"),
                    absl::StrCat("write at most ", limits::kValuesPerAxis));
    }
    std::set<std::string> seen;
    for (const Node& item : node.items) {
      const std::optional<Value> value = ReadValue(item, target, path);
      if (!value) continue;
      std::string text = CanonicalText(target, *value);
      if (!seen.insert(text).second && !may_repeat) {
        Report(item.place, path, item.text, "the same value is listed twice", "remove one of them");
        continue;
      }
      axis->add_values(std::move(text));
    }
  }

  std::optional<Value> ReadValue(const Node& node, const FieldDescriptor& field,
                                 const std::string& path) {
    if (node.kind != Node::Kind::kText) {
      Report(node.place, path, std::nullopt,
             node.kind == Node::Kind::kNull
                 ? "has no value"
                 : absl::StrCat("is ", KindName(node.kind), ", not a single value"),
             absl::StrCat("write ", TypeText(field)));
      return std::nullopt;
    }
    Problem problem = {.place = node.place, .field = path, .value = node.text};
    std::optional<Value> value;
    if (const std::optional<std::string> text = Substitute(node.text, &problem)) {
      value = ParseValue(field, *text, &problem);
      if (*text != node.text) problem.value = absl::StrCat(node.text, " = ", *text);
    }
    if (!value) problems_.Add(std::move(problem));
    return value;
  }

  // Replaces ${NAME} and ${NAME:default}. What a variable holds is a value, never structure.
  std::optional<std::string> Substitute(absl::string_view text, Problem* problem) const {
    std::string result;
    for (size_t start; (start = text.find("${")) != absl::string_view::npos;) {
      const size_t end = text.find('}', start);
      if (end == absl::string_view::npos) {
        problem->what = "\"${\" without \"}\"";
        problem->remedy = "write ${NAME} or ${NAME:default}";
        return std::nullopt;
      }
      const absl::string_view inside = text.substr(start + 2, end - start - 2);
      const size_t colon = std::min(inside.find(':'), inside.size());
      const absl::string_view name = inside.substr(0, colon);
      std::optional<std::string> value =
          options_.environment ? options_.environment(name) : std::nullopt;
      if (!value && colon < inside.size()) value = std::string(inside.substr(colon + 1));
      if (!value) {
        problem->what = absl::StrCat("environment variable ", name, " is not set");
        problem->remedy = absl::StrCat("set it, or write ${", name, ":default}");
        return std::nullopt;
      }
      absl::StrAppend(&result, text.substr(0, start), *value);
      text.remove_prefix(end + 1);
    }
    return absl::StrCat(result, text);
  }

  const Descriptor& root_;
  const ReadOptions& options_;
  SourceMap& places_;
  ProblemList& problems_;
};

}  // namespace

bool ReadText(absl::string_view text, const ReadOptions& options, Message* message,
              SourceMap* places, ProblemList* problems) {
  const size_t before = problems->problems().size();
  if (text.size() > limits::kSpecFileBytes) {
    problems->Add({.what = absl::StrCat("text of ", text.size(), " bytes"),
                   .remedy = absl::StrCat("write at most ", limits::kSpecFileBytes)});
    return false;
  }
  if (!IsValidUtf8(text) || absl::StrContains(text, absl::string_view("\0", 1))) {
    problems->Add({.what = "not UTF-8 text", .remedy = "save it as UTF-8"});
    return false;
  }
  Node root;
  if (!ParseTree(text, &root, problems)) return false;
  SourceMap own_places;
  SourceMap* map = places == nullptr ? &own_places : places;
  map->Set("", root.kind == Node::Kind::kNull ? TextPlace{1, 1} : root.place);
  Reader(*message->GetDescriptor(), options, map, problems).ReadMessage(root, "", message);
  return problems->problems().size() == before;
}

}  // namespace kvsweep
