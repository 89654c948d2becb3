// Messages, and the schema itself, as text. Everything is first laid out as a small tree, then
// written as JSON or YAML, so that each form is written once.
#include <algorithm>
#include <cmath>
#include <functional>
#include <set>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "base/text.h"
#include "proto/schema.h"
#include "proto/schema_internal.h"

namespace kvsweep {

using namespace internal_schema;  // NOLINT: the walker's own parts

namespace {

// A JSON value. Numbers, true and false are kept as their text.
struct Tree {
  enum class Kind { kPlain, kText, kList, kMap };
  Kind kind = Kind::kMap;
  std::string text;
  std::vector<Tree> items;
  std::vector<std::string> keys;  // kMap, beside items

  static Tree Plain(std::string text) { return {Kind::kPlain, std::move(text), {}, {}}; }
  static Tree Text(std::string text) { return {Kind::kText, std::move(text), {}, {}}; }
  static Tree List() { return {Kind::kList, "", {}, {}}; }

  Tree& Put(std::string key, Tree item) {
    keys.push_back(std::move(key));
    items.push_back(std::move(item));
    return *this;
  }
};

std::string Quote(absl::string_view text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      quoted += {'\\', c};
    } else if (static_cast<uint8_t>(c) < 0x20) {
      absl::StrAppendFormat(&quoted, "\\u%04x", c);
    } else {
      quoted += c;
    }
  }
  return quoted + "\"";
}

// One line without `indent` < 0; else indented by two spaces a level.
void WriteJson(const Tree& tree, int indent, std::string* out) {
  if (tree.kind == Tree::Kind::kPlain) return absl::StrAppend(out, tree.text);
  if (tree.kind == Tree::Kind::kText) return absl::StrAppend(out, Quote(tree.text));
  const bool map = tree.kind == Tree::Kind::kMap;
  absl::StrAppend(out, map ? "{" : "[");
  for (size_t i = 0; i < tree.items.size(); ++i) {
    if (i > 0) absl::StrAppend(out, ",");
    if (indent >= 0) absl::StrAppend(out, "\n", std::string(2 * (indent + 1), ' '));
    if (map) absl::StrAppend(out, Quote(tree.keys[i]), indent >= 0 ? ": " : ":");
    WriteJson(tree.items[i], indent >= 0 ? indent + 1 : indent, out);
  }
  if (indent >= 0 && !tree.items.empty()) absl::StrAppend(out, "\n", std::string(2 * indent, ' '));
  absl::StrAppend(out, map ? "}" : "]");
}

// Whether YAML reads `text` back as it stands, without quotes.
bool NeedsNoQuotes(absl::string_view text) {
  if (text.empty() || !(absl::ascii_isalnum(text[0]) || text[0] == '/' || text[0] == '.'))
    return false;
  return std::all_of(text.begin(), text.end(),
                     [](char c) {
                       return absl::ascii_isalnum(c) ||
                              absl::StrContains("_-./%+", std::string(1, c));
                     }) &&
         text != "null" && text != "Null" && text != "NULL" && text != "---" && text != "...";
}

std::string YamlScalar(const Tree& tree) {
  return tree.kind == Tree::Kind::kPlain || NeedsNoQuotes(tree.text) ? tree.text : Quote(tree.text);
}

bool IsScalar(const Tree& tree) {
  return tree.kind == Tree::Kind::kPlain || tree.kind == Tree::Kind::kText;
}

// Writes the entries of a map or list, each on a line that `indent` spaces begin.
void WriteYaml(const Tree& tree, int indent, std::string* out) {
  for (size_t i = 0; i < tree.items.size(); ++i) {
    const Tree& item = tree.items[i];
    const std::string margin(indent, ' ');
    if (tree.kind == Tree::Kind::kList) {
      std::string entry;
      WriteYaml(item, indent + 2, &entry);
      entry.replace(0, std::min<size_t>(entry.size(), indent + 2), margin + "- ");
      absl::StrAppend(out, entry.empty() ? margin + "- {}\n" : entry);
      continue;
    }
    absl::StrAppend(out, margin, NeedsNoQuotes(tree.keys[i]) ? tree.keys[i] : Quote(tree.keys[i]),
                    ":");
    const bool flow =
        item.kind == Tree::Kind::kList && !item.items.empty() && IsScalar(item.items[0]);
    if (IsScalar(item)) {
      absl::StrAppend(out, " ", YamlScalar(item), "\n");
    } else if (item.items.empty()) {
      absl::StrAppend(out, item.kind == Tree::Kind::kMap ? " {}\n" : " []\n");
    } else if (flow) {
      const auto scalar = [](std::string* text, const Tree& value) {
        absl::StrAppend(text, YamlScalar(value));
      };
      absl::StrAppend(out, " [", absl::StrJoin(item.items, ", ", scalar), "]\n");
    } else {
      absl::StrAppend(out, "\n");
      WriteYaml(item, indent + 2, out);
    }
  }
}

// -------------------------------------------------------------------------------- messages as
// trees

Tree ValueTree(const FieldDescriptor& field, const Value& value, bool canonical) {
  if (field.type() == FieldDescriptor::TYPE_BYTES) {
    return Tree::Text(absl::BytesToHexString(std::get<std::string>(value)));
  }
  if (canonical) {
    // Base integer units: a number without its unit. What is no JSON number stays a text.
    if (const auto* number = std::get_if<uint64_t>(&value))
      return Tree::Plain(absl::StrCat(*number));
    if (const auto* number = std::get_if<double>(&value);
        number != nullptr && std::isfinite(*number)) {
      return Tree::Plain(FormatNumber(*number));
    }
  }
  const std::string text = canonical ? CanonicalText(field, value) : PrettyText(field, value);
  const auto* number = std::get_if<double>(&value);
  const bool plain =
      std::holds_alternative<bool>(value) || std::holds_alternative<int64_t>(value) ||
      (number != nullptr && std::isfinite(*number) && RuleOf(field).unit() != UNIT_PER_SECOND) ||
      (std::holds_alternative<uint64_t>(value) && RuleOf(field).unit() != UNIT_BYTES &&
       RuleOf(field).unit() != UNIT_NANOSECONDS);
  return plain ? Tree::Plain(text) : Tree::Text(text);
}

void SortKeys(Tree* tree) {
  std::vector<size_t> order(tree->keys.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return tree->keys[a] < tree->keys[b]; });
  Tree sorted;
  for (const size_t i : order) sorted.Put(std::move(tree->keys[i]), std::move(tree->items[i]));
  *tree = std::move(sorted);
}

class MessageLayout {
 public:
  MessageLayout(const Descriptor& root, bool canonical) : root_(root), canonical_(canonical) {}

  Tree Layout(const Message& message) const {
    const google::protobuf::Reflection& reflection = *message.GetReflection();
    Tree tree;
    for (int i = 0; i < message.GetDescriptor()->field_count(); ++i) {
      const FieldDescriptor& field = *message.GetDescriptor()->field(i);
      if (field.is_repeated()) {
        if (reflection.FieldSize(message, &field) > 0) tree.Put(field.name(), List(message, field));
      } else if (!reflection.HasField(message, &field)) {
        continue;
      } else if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
        Tree inner = Layout(reflection.GetMessage(message, &field));
        if (!(canonical_ && inner.items.empty())) tree.Put(field.name(), std::move(inner));
      } else {
        const Value value = GetValue(message, field);
        if (canonical_ && DefaultOf(field) == value) continue;
        tree.Put(field.name(), ValueTree(field, value, canonical_));
      }
    }
    if (canonical_) SortKeys(&tree);
    return tree;
  }

 private:
  Tree List(const Message& message, const FieldDescriptor& field) const {
    const google::protobuf::Reflection& reflection = *message.GetReflection();
    if (RuleOf(field).points() && !canonical_) return Points(message, field);
    if (RuleOf(field).axes() && !canonical_) return Axes(message, field);
    Tree list = Tree::List();
    for (int i = 0; i < reflection.FieldSize(message, &field); ++i) {
      list.items.push_back(field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE
                               ? Layout(reflection.GetRepeatedMessage(message, &field, i))
                               : ValueTree(field, GetRepeatedValue(message, field, i), canonical_));
    }
    return list;
  }

  Tree Axes(const Message& message, const FieldDescriptor& field) const {
    Tree map;
    for (const Axis* axis : AxesOf(message, field)) {
      Tree values = Tree::List();
      for (const std::string& value : axis->values()) {
        values.items.push_back(AxisValue(message, *axis, value));
      }
      map.Put(axis->path(), std::move(values));
    }
    return map;
  }

  Tree Points(const Message& message, const FieldDescriptor& field) const {
    const std::vector<const Axis*> axes = AxesOf(message, field);
    Tree points = Tree::List();
    for (int i = 0; !axes.empty() && i < axes.front()->values_size(); ++i) {
      Tree point;
      for (const Axis* axis : axes) {
        if (i < axis->values_size()) {
          point.Put(axis->path(), AxisValue(message, *axis, axis->values(i)));
        }
      }
      points.items.push_back(std::move(point));
    }
    return points;
  }

  Tree AxisValue(const Message& message, const Axis& axis, const std::string& value) const {
    const Descriptor& owner = *message.GetDescriptor();
    Problem problem;
    const FieldDescriptor* target =
        FindAxisTarget(HoldsOnlyAxes(owner) ? root_ : owner, axis.path(), &problem);
    return Tree::Text(target == nullptr ? value : PrettyValue(*target, value));
  }

  const Descriptor& root_;
  const bool canonical_;
};

// ---------------------------------------------------------------------------------- the reference

// One message of the reference, under the path where it is first met.
struct Section {
  std::string title;
  const Descriptor* descriptor;
};

void CollectSections(const Descriptor& descriptor, const std::string& title,
                     std::set<const Descriptor*>* seen, std::vector<Section>* sections) {
  if (!seen->insert(&descriptor).second) return;
  sections->push_back({title, &descriptor});
  for (int i = 0; i < descriptor.field_count(); ++i) {
    const FieldDescriptor& field = *descriptor.field(i);
    if (field.cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE || RuleOf(field).axes()) continue;
    const std::string inner = JoinPath(title, field.name()) + (field.is_repeated() ? "[]" : "");
    CollectSections(*field.message_type(), inner, seen, sections);
  }
}

std::vector<Section> Sections(const Descriptor& root) {
  std::set<const Descriptor*> seen;
  std::vector<Section> sections;
  CollectSections(root, "", &seen, &sections);
  return sections;
}

// What one value of a field takes, in a word or two.
std::string TakesOne(const FieldDescriptor& field) {
  const Rule& rule = RuleOf(field);
  if (rule.points()) return "list of path: value";
  if (rule.axes()) return "path: [values]";
  if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE)
    return field.is_repeated() ? "list" : "group";
  if (rule.file()) return "file";
  if (rule.folder()) return "folder";
  switch (rule.unit()) {
    case UNIT_BYTES:
      return "bytes";
    case UNIT_NANOSECONDS:
      return "duration";
    case UNIT_PER_SECOND:
      return "rate";
    case UNIT_TOKENS:
      return "tokens";
    case UNIT_RATIO:
      return "ratio";
    default:
      break;
  }
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_ENUM:
      return absl::StrJoin(EnumNames(*field.enum_type()), ", ");
    case FieldDescriptor::CPPTYPE_STRING:
      return "text";
    case FieldDescriptor::CPPTYPE_BOOL:
      return "true, false";
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return "number";
    default:
      return "whole number";
  }
}

// What a field takes, in a few words.
std::string Takes(const FieldDescriptor& field) {
  const bool values = field.is_repeated() && field.cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE;
  return absl::StrCat(values ? "list of " : "", TakesOne(field));
}

std::string DefaultText(const FieldDescriptor& field) {
  const Rule& rule = RuleOf(field);
  return rule.required() ? "required" : rule.default_value();
}

// "from 0 to 1" -> "0 to 1".
std::string ShortRange(const FieldDescriptor& field) {
  const std::string range = RangeText(field);
  for (absl::string_view word : {"from ", "of "}) {
    if (absl::StartsWith(range, word)) return range.substr(word.size());
  }
  return range;
}

std::string UnitsText() {
  return "Sizes: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB or plain bytes. Durations: ns, us, ms, s, "
         "min, h, d.\n"
         "Rates: 4/s, 90/min, 10/h, inf. Ratios: 0.2 or 20%. ${NAME} and ${NAME:default} take "
         "environment variables.\n";
}

// ------------------------------------------------------------------------------------- JSON Schema

Tree FieldSchema(const FieldDescriptor& field, const std::function<Tree(const Descriptor&)>& refer);

Tree MessageSchema(const Descriptor& descriptor,
                   const std::function<Tree(const Descriptor&)>& refer) {
  Tree properties;
  Tree required = Tree::List();
  for (int i = 0; i < descriptor.field_count(); ++i) {
    const FieldDescriptor& field = *descriptor.field(i);
    if (RuleOf(field).internal()) continue;
    properties.Put(field.name(), FieldSchema(field, refer));
    if (RuleOf(field).required()) required.items.push_back(Tree::Text(field.name()));
  }
  Tree schema;
  schema.Put("type", Tree::Text("object")).Put("additionalProperties", Tree::Plain("false"));
  schema.Put("properties", std::move(properties));
  if (!required.items.empty()) schema.Put("required", std::move(required));
  return schema;
}

Tree TypeList(std::vector<std::string> names) {
  if (names.size() == 1) return Tree::Text(names[0]);
  Tree list = Tree::List();
  for (std::string& name : names) list.items.push_back(Tree::Text(std::move(name)));
  return list;
}

Tree PlainSchema(const FieldDescriptor& field) {
  const Rule& rule = RuleOf(field);
  Tree schema;
  bool bounded = false;
  if (field.cpp_type() == FieldDescriptor::CPPTYPE_ENUM) {
    Tree names = Tree::List();
    for (std::string& name : EnumNames(*field.enum_type()))
      names.items.push_back(Tree::Text(std::move(name)));
    schema.Put("enum", std::move(names));
  } else if (field.cpp_type() == FieldDescriptor::CPPTYPE_BOOL) {
    schema.Put("type", Tree::Text("boolean"));
  } else if (field.cpp_type() == FieldDescriptor::CPPTYPE_STRING) {
    schema.Put("type", Tree::Text("string"));
  } else if (rule.unit() == UNIT_NANOSECONDS || rule.unit() == UNIT_PER_SECOND) {
    schema.Put("type", Tree::Text("string"));
  } else {
    const bool whole = field.cpp_type() != FieldDescriptor::CPPTYPE_DOUBLE;
    const bool text = rule.unit() == UNIT_BYTES || rule.unit() == UNIT_RATIO || rule.allow_inf();
    std::vector<std::string> types = {whole ? "integer" : "number"};
    if (text) types.push_back("string");
    schema.Put("type", TypeList(std::move(types)));
    bounded = true;
  }
  if (bounded && rule.has_min()) schema.Put("minimum", Tree::Plain(FormatNumber(rule.min())));
  if (bounded && rule.has_max()) schema.Put("maximum", Tree::Plain(FormatNumber(rule.max())));
  return schema;
}

Tree AxesSchema() {
  Tree values;
  values.Put("type", Tree::Text("array")).Put("minItems", Tree::Plain("1"));
  Tree schema;
  schema.Put("type", Tree::Text("object")).Put("additionalProperties", std::move(values));
  return schema;
}

Tree PointsSchema() {
  Tree point;
  point.Put("type", Tree::Text("object"));
  Tree schema;
  schema.Put("type", Tree::Text("array")).Put("minItems", Tree::Plain("1"));
  schema.Put("items", std::move(point));
  return schema;
}

Tree FieldSchema(const FieldDescriptor& field,
                 const std::function<Tree(const Descriptor&)>& refer) {
  const Rule& rule = RuleOf(field);
  Tree schema;
  if (rule.axes()) {
    schema = rule.points() ? PointsSchema() : AxesSchema();
  } else if (field.cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) {
    if (field.is_repeated()) {
      schema.Put("type", Tree::Text("array")).Put("items", PlainSchema(field));
    } else {
      schema = PlainSchema(field);
    }
  } else if (field.is_repeated()) {
    schema.Put("type", Tree::Text("array")).Put("items", refer(*field.message_type()));
  } else {
    schema = refer(*field.message_type());
  }
  schema.Put("description", Tree::Text(rule.help()));
  if (const std::optional<Value> value = DefaultOf(field)) {
    schema.Put("default", ValueTree(field, *value, /*canonical=*/false));
  }
  return schema;
}

std::string MarkdownCell(absl::string_view text) {
  return absl::StrReplaceAll(text, {{"|", "\\|"}});
}

// Breaks `text` into lines of at most `width` bytes.
std::vector<std::string> Wrap(absl::string_view text, size_t width) {
  std::vector<std::string> lines(1);
  for (absl::string_view word : absl::StrSplit(text, ' ')) {
    if (!lines.back().empty() && lines.back().size() + 1 + word.size() > width)
      lines.emplace_back();
    absl::StrAppend(&lines.back(), lines.back().empty() ? "" : " ", word);
  }
  return lines;
}

}  // namespace

std::string CanonicalJson(const Message& message) {
  std::string text;
  WriteJson(MessageLayout(*message.GetDescriptor(), /*canonical=*/true).Layout(message), -1, &text);
  return text;
}

std::string ToYaml(const Message& message) {
  std::string text;
  WriteYaml(MessageLayout(*message.GetDescriptor(), /*canonical=*/false).Layout(message), 0, &text);
  return text;
}

std::string ToPrettyJson(const Message& message) {
  std::string text;
  WriteJson(MessageLayout(*message.GetDescriptor(), /*canonical=*/false).Layout(message), 0, &text);
  return text + "\n";
}

std::string ReferenceMarkdown(const Descriptor& root) {
  std::string text = absl::StrCat("# Reference of the spec\n\n", UnitsText(), "\n");
  for (const Section& section : Sections(root)) {
    absl::StrAppend(
        &text, "## ", section.title.empty() ? "The spec" : section.title,
        "\n\n| field | takes | default | range | meaning |\n| --- | --- | --- | --- | --- |\n");
    for (int i = 0; i < section.descriptor->field_count(); ++i) {
      const FieldDescriptor& field = *section.descriptor->field(i);
      if (RuleOf(field).internal()) continue;
      absl::StrAppend(&text, "| `", field.name(), "` | ", MarkdownCell(Takes(field)), " | ",
                      MarkdownCell(DefaultText(field)), " | ", ShortRange(field), " | ",
                      MarkdownCell(RuleOf(field).help()), " |\n");
    }
    absl::StrAppend(&text, "\n");
  }
  return text;
}

std::string ReferenceText(const Descriptor& root) {
  constexpr int kNameWidth = 24;
  constexpr size_t kHelpWidth = 92;
  std::string text = absl::StrCat(UnitsText(), "\n");
  for (const Section& section : Sections(root)) {
    absl::StrAppend(&text, section.title.empty() ? "(the spec)" : section.title, "\n");
    for (int i = 0; i < section.descriptor->field_count(); ++i) {
      const FieldDescriptor& field = *section.descriptor->field(i);
      const Rule& rule = RuleOf(field);
      if (rule.internal()) continue;
      std::vector<std::string> facts = {Takes(field)};
      if (!ShortRange(field).empty()) facts.push_back(ShortRange(field));
      if (rule.required()) facts.push_back("required");
      if (!rule.default_value().empty())
        facts.push_back(absl::StrCat("default ", rule.default_value()));
      absl::StrAppendFormat(&text, "  %-*s%s\n", kNameWidth, field.name(),
                            absl::StrJoin(facts, "; "));
      for (const std::string& line : Wrap(rule.help(), kHelpWidth)) {
        absl::StrAppend(&text, std::string(kNameWidth + 4, ' '), line, "\n");
      }
    }
    absl::StrAppend(&text, "\n");
  }
  return text;
}

std::string JsonSchema(const Descriptor& root) {
  const auto refer = [](const Descriptor& descriptor) {
    Tree reference;
    reference.Put("$ref", Tree::Text(absl::StrCat("#/$defs/", descriptor.name())));
    return reference;
  };
  Tree schema;
  schema.Put("$schema", Tree::Text("https://json-schema.org/draft/2020-12/schema"));
  schema.Put("title", Tree::Text(absl::StrCat("kvsweep ", root.name())));
  Tree top = MessageSchema(root, refer);
  for (size_t i = 0; i < top.keys.size(); ++i) schema.Put(top.keys[i], std::move(top.items[i]));
  Tree definitions;
  for (const Section& section : Sections(root)) {
    if (section.descriptor == &root) continue;
    definitions.Put(section.descriptor->name(), MessageSchema(*section.descriptor, refer));
  }
  schema.Put("$defs", std::move(definitions));
  std::string text;
  WriteJson(schema, 0, &text);
  return text + "\n";
}

}  // namespace kvsweep
