// Single values: from text, to text, in and out of messages.
#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "base/check.h"
#include "base/text.h"
#include "proto/schema_internal.h"

namespace kvsweep::internal_schema {
namespace {

// Longest text of any field; what needs less says so where it is used.
constexpr size_t kMaxTextBytes = 64 * 1024;

bool Refuse(Problem* problem, std::string what, std::string remedy) {
  problem->what = std::move(what);
  problem->remedy = std::move(remedy);
  return false;
}

// Digits only: no sign, no fraction, no exponent.
bool ParseWhole(absl::string_view text, uint64_t* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size() && !text.empty();
}

std::optional<double> ParseRatio(absl::string_view text) {
  const bool percent = absl::ConsumeSuffix(&text, "%");
  absl::StatusOr<double> number = ParseNumber(text);
  if (!number.ok()) return std::nullopt;
  // Division rounds once: "20%" is the same double as 0.2.
  return percent ? *number / 100 : *number;
}

// The number that a text stands for, by the field's unit; nothing if it is not one.
std::optional<double> ParseReal(Unit unit, absl::string_view text) {
  if (text == ".inf") text = "inf";  // YAML's own spelling
  if (unit == UNIT_RATIO) return ParseRatio(text);
  absl::StatusOr<double> number =
      unit == UNIT_PER_SECOND ? ParseRatePerSecond(text) : ParseNumber(text);
  if (!number.ok()) return std::nullopt;
  return *number;
}

std::optional<uint64_t> ParseCount(Unit unit, absl::string_view text) {
  if (unit == UNIT_BYTES || unit == UNIT_NANOSECONDS) {
    absl::StatusOr<int64_t> number = unit == UNIT_BYTES ? ParseBytes(text) : ParseDurationNs(text);
    if (!number.ok()) return std::nullopt;
    return static_cast<uint64_t>(*number);
  }
  uint64_t number = 0;
  if (!ParseWhole(text, &number)) return std::nullopt;
  return number;
}

std::optional<Value> ParseBool(absl::string_view text) {
  for (absl::string_view yes : {"true", "on", "yes"}) {
    if (text == yes) return Value(true);
  }
  for (absl::string_view no : {"false", "off", "no"}) {
    if (text == no) return Value(false);
  }
  return std::nullopt;
}

std::optional<Value> ParseEnum(const EnumDescriptor& descriptor, absl::string_view text) {
  for (int i = 0; i < descriptor.value_count(); ++i) {
    if (EnumName(*descriptor.value(i)) == text) {
      return Value(EnumNumber{descriptor.value(i)->number()});
    }
  }
  return std::nullopt;
}

std::optional<Value> ParseByType(const FieldDescriptor& field, absl::string_view text) {
  const Unit unit = RuleOf(field).unit();
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_BOOL:
      return ParseBool(text);
    case FieldDescriptor::CPPTYPE_UINT32:
    case FieldDescriptor::CPPTYPE_UINT64: {
      const std::optional<uint64_t> count = ParseCount(unit, text);
      if (!count) return std::nullopt;
      return Value(*count);
    }
    case FieldDescriptor::CPPTYPE_INT32:
    case FieldDescriptor::CPPTYPE_INT64: {
      const std::optional<uint64_t> count = ParseCount(unit, text);
      if (!count || *count > uint64_t{std::numeric_limits<int64_t>::max()}) return std::nullopt;
      return Value(static_cast<int64_t>(*count));
    }
    case FieldDescriptor::CPPTYPE_DOUBLE:
    case FieldDescriptor::CPPTYPE_FLOAT: {
      const std::optional<double> number = ParseReal(unit, text);
      if (!number) return std::nullopt;
      return Value(*number);
    }
    case FieldDescriptor::CPPTYPE_ENUM:
      return ParseEnum(*field.enum_type(), text);
    case FieldDescriptor::CPPTYPE_STRING:
      return Value(std::string(text));
    default:
      return std::nullopt;
  }
}

std::optional<double> AsNumber(const Value& value) {
  if (const auto* number = std::get_if<int64_t>(&value)) return static_cast<double>(*number);
  if (const auto* number = std::get_if<uint64_t>(&value)) return static_cast<double>(*number);
  if (const auto* number = std::get_if<double>(&value)) return *number;
  return std::nullopt;
}

// A bound of a range for people. Bounds are doubles in the rule; units only round them for reading.
std::string BoundText(Unit unit, double bound) {
  if (unit == UNIT_BYTES)
    return absl::StrReplaceAll(FormatBytes(static_cast<int64_t>(bound)), {{" ", ""}});
  if (unit == UNIT_NANOSECONDS) {
    return absl::StrReplaceAll(FormatDurationNs(static_cast<int64_t>(bound)), {{" ", ""}});
  }
  const std::string number =
      std::abs(bound) >= 1 && std::abs(bound) < 1e15 && bound == std::floor(bound)
          ? absl::StrCat(static_cast<int64_t>(bound))
          : FormatNumber(bound);
  return unit == UNIT_PER_SECOND ? absl::StrCat(number, "/s") : number;
}

struct NamedUnit {
  absl::string_view name;
  uint64_t factor;
};

// The largest unit that divides `number`, so that the text is exact.
template <size_t kCount>
std::string ExactText(uint64_t number, const std::array<NamedUnit, kCount>& units) {
  for (const NamedUnit& unit : units) {
    if (number != 0 && number % unit.factor == 0)
      return absl::StrCat(number / unit.factor, unit.name);
  }
  return absl::StrCat(number);
}

constexpr std::array<NamedUnit, 5> kByteUnits = {{{"TiB", uint64_t{1} << 40},
                                                  {"GiB", uint64_t{1} << 30},
                                                  {"MiB", uint64_t{1} << 20},
                                                  {"KiB", uint64_t{1} << 10},
                                                  {"B", 1}}};
constexpr std::array<NamedUnit, 6> kDurationUnits = {{{"h", 3'600'000'000'000},
                                                      {"min", 60'000'000'000},
                                                      {"s", 1'000'000'000},
                                                      {"ms", 1'000'000},
                                                      {"us", 1'000},
                                                      {"ns", 1}}};

std::string CountText(Unit unit, uint64_t number, bool pretty) {
  if (unit == UNIT_NANOSECONDS) {
    if (pretty) return ExactText(number, kDurationUnits);
    return number == 0 ? "0" : absl::StrCat(number, "ns");
  }
  if (unit == UNIT_BYTES && pretty) return ExactText(number, kByteUnits);
  return absl::StrCat(number);
}

std::string ToText(const FieldDescriptor& field, const Value& value, bool pretty) {
  const Unit unit = RuleOf(field).unit();
  if (const auto* flag = std::get_if<bool>(&value)) return *flag ? "true" : "false";
  if (const auto* number = std::get_if<int64_t>(&value)) return absl::StrCat(*number);
  if (const auto* number = std::get_if<uint64_t>(&value)) return CountText(unit, *number, pretty);
  if (const auto* number = std::get_if<double>(&value)) {
    const bool rate = unit == UNIT_PER_SECOND && std::isfinite(*number);
    return absl::StrCat(FormatNumber(*number), rate ? "/s" : "");
  }
  if (const auto* number = std::get_if<EnumNumber>(&value)) {
    const EnumValueDescriptor* named = field.enum_type()->FindValueByNumber(number->number);
    return named == nullptr ? absl::StrCat(number->number) : EnumName(*named);
  }
  return std::get<std::string>(value);
}

bool CheckText(const FieldDescriptor& field, const std::string& text, Problem* problem) {
  if (field.type() == FieldDescriptor::TYPE_BYTES) return true;
  if (text.size() > kMaxTextBytes) {
    return Refuse(problem, absl::StrCat("text of ", text.size(), " bytes"),
                  absl::StrCat("write at most ", kMaxTextBytes));
  }
  if (!IsValidUtf8(text)) return Refuse(problem, "text is not UTF-8", "save it as UTF-8");
  const auto is_control = [](char c) { return absl::ascii_iscntrl(c) && c != '\n' && c != '\t'; };
  if (std::any_of(text.begin(), text.end(), is_control)) {
    return Refuse(problem, "text holds a control character", "remove it");
  }
  return true;
}

bool CheckRange(const FieldDescriptor& field, double number, Problem* problem) {
  const Rule& rule = RuleOf(field);
  if (std::isinf(number) && number > 0 && rule.allow_inf()) return true;
  if (!std::isfinite(number)) {
    return Refuse(problem, "not a finite number", absl::StrCat("write ", TypeText(field)));
  }
  const std::string remedy = absl::StrCat("write a value ", RangeText(field));
  if (rule.has_min() && number < rule.min()) {
    return Refuse(problem, absl::StrCat("below the minimum ", BoundText(rule.unit(), rule.min())),
                  remedy);
  }
  if (rule.has_max() && number > rule.max()) {
    return Refuse(problem, absl::StrCat("above the maximum ", BoundText(rule.unit(), rule.max())),
                  remedy);
  }
  return true;
}

bool CheckWidth(const FieldDescriptor& field, const Value& value, Problem* problem) {
  const auto* number = std::get_if<uint64_t>(&value);
  if (field.cpp_type() == FieldDescriptor::CPPTYPE_UINT32 && number != nullptr &&
      *number > std::numeric_limits<uint32_t>::max()) {
    return Refuse(problem, "too large", "write a value up to 4294967295");
  }
  return true;
}

}  // namespace

const Rule& RuleOf(const FieldDescriptor& field) { return field.options().GetExtension(rule); }

std::optional<Value> ParseValue(const FieldDescriptor& field, absl::string_view text,
                                Problem* problem) {
  const absl::string_view trimmed =
      field.cpp_type() == FieldDescriptor::CPPTYPE_STRING ? text : absl::StripAsciiWhitespace(text);
  const std::optional<Value> value = ParseByType(field, trimmed);
  if (!value) {
    std::string what = absl::StrCat("is not ", TypeText(field));
    std::string remedy;
    if (field.cpp_type() == FieldDescriptor::CPPTYPE_ENUM) {
      const std::vector<std::string> names = EnumNames(*field.enum_type());
      what = "is none of the choices";
      const std::optional<std::string> nearest = NearestName(trimmed, names);
      remedy = nearest ? absl::StrCat("did you mean \"", *nearest, "\"?")
                       : absl::StrCat("write one of ", absl::StrJoin(names, ", "));
    }
    Refuse(problem, what, remedy);
    return std::nullopt;
  }
  if (!CheckWidth(field, *value, problem) || !CheckValue(field, *value, problem)) {
    return std::nullopt;
  }
  return value;
}

bool CheckValue(const FieldDescriptor& field, const Value& value, Problem* problem) {
  if (const auto* text = std::get_if<std::string>(&value)) return CheckText(field, *text, problem);
  if (const auto* number = std::get_if<EnumNumber>(&value)) {
    if (field.enum_type()->FindValueByNumber(number->number) != nullptr) return true;
    return Refuse(
        problem, "is none of the choices",
        absl::StrCat("write one of ", absl::StrJoin(EnumNames(*field.enum_type()), ", ")));
  }
  const std::optional<double> number = AsNumber(value);
  return !number || CheckRange(field, *number, problem);
}

Value GetValue(const Message& message, const FieldDescriptor& field) {
  const google::protobuf::Reflection& reflection = *message.GetReflection();
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_BOOL:
      return reflection.GetBool(message, &field);
    case FieldDescriptor::CPPTYPE_UINT32:
      return uint64_t{reflection.GetUInt32(message, &field)};
    case FieldDescriptor::CPPTYPE_UINT64:
      return uint64_t{reflection.GetUInt64(message, &field)};
    case FieldDescriptor::CPPTYPE_INT32:
      return int64_t{reflection.GetInt32(message, &field)};
    case FieldDescriptor::CPPTYPE_INT64:
      return int64_t{reflection.GetInt64(message, &field)};
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return reflection.GetDouble(message, &field);
    case FieldDescriptor::CPPTYPE_FLOAT:
      return static_cast<double>(reflection.GetFloat(message, &field));
    case FieldDescriptor::CPPTYPE_ENUM:
      return EnumNumber{reflection.GetEnumValue(message, &field)};
    default:
      return reflection.GetString(message, &field);
  }
}

Value GetRepeatedValue(const Message& message, const FieldDescriptor& field, int index) {
  const google::protobuf::Reflection& reflection = *message.GetReflection();
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_BOOL:
      return reflection.GetRepeatedBool(message, &field, index);
    case FieldDescriptor::CPPTYPE_UINT32:
      return uint64_t{reflection.GetRepeatedUInt32(message, &field, index)};
    case FieldDescriptor::CPPTYPE_UINT64:
      return uint64_t{reflection.GetRepeatedUInt64(message, &field, index)};
    case FieldDescriptor::CPPTYPE_INT32:
      return int64_t{reflection.GetRepeatedInt32(message, &field, index)};
    case FieldDescriptor::CPPTYPE_INT64:
      return int64_t{reflection.GetRepeatedInt64(message, &field, index)};
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return reflection.GetRepeatedDouble(message, &field, index);
    case FieldDescriptor::CPPTYPE_FLOAT:
      return static_cast<double>(reflection.GetRepeatedFloat(message, &field, index));
    case FieldDescriptor::CPPTYPE_ENUM:
      return EnumNumber{reflection.GetRepeatedEnumValue(message, &field, index)};
    default:
      return reflection.GetRepeatedString(message, &field, index);
  }
}

void SetValue(Message* message, const FieldDescriptor& field, const Value& value) {
  const google::protobuf::Reflection& reflection = *message->GetReflection();
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_BOOL:
      return reflection.SetBool(message, &field, std::get<bool>(value));
    case FieldDescriptor::CPPTYPE_UINT32:
      return reflection.SetUInt32(message, &field,
                                  static_cast<uint32_t>(std::get<uint64_t>(value)));
    case FieldDescriptor::CPPTYPE_UINT64:
      return reflection.SetUInt64(message, &field, std::get<uint64_t>(value));
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return reflection.SetDouble(message, &field, std::get<double>(value));
    case FieldDescriptor::CPPTYPE_ENUM:
      return reflection.SetEnumValue(message, &field, std::get<EnumNumber>(value).number);
    case FieldDescriptor::CPPTYPE_STRING:
      return reflection.SetString(message, &field, std::get<std::string>(value));
    default:
      KVSWEEP_CHECK(false) << field.full_name() << ": a type that specs do not use";
  }
}

void AddRepeatedValue(Message* message, const FieldDescriptor& field, const Value& value) {
  const google::protobuf::Reflection& reflection = *message->GetReflection();
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_UINT32:
      return reflection.AddUInt32(message, &field,
                                  static_cast<uint32_t>(std::get<uint64_t>(value)));
    case FieldDescriptor::CPPTYPE_UINT64:
      return reflection.AddUInt64(message, &field, std::get<uint64_t>(value));
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return reflection.AddDouble(message, &field, std::get<double>(value));
    case FieldDescriptor::CPPTYPE_STRING:
      return reflection.AddString(message, &field, std::get<std::string>(value));
    default:
      KVSWEEP_CHECK(false) << field.full_name() << ": a list that specs do not use";
  }
}

std::string CanonicalText(const FieldDescriptor& field, const Value& value) {
  return ToText(field, value, /*pretty=*/false);
}

std::string PrettyText(const FieldDescriptor& field, const Value& value) {
  return ToText(field, value, /*pretty=*/true);
}

std::optional<Value> DefaultOf(const FieldDescriptor& field) {
  const Rule& rule = RuleOf(field);
  if (rule.default_value().empty()) return std::nullopt;
  Problem problem;
  std::optional<Value> value = ParseValue(field, rule.default_value(), &problem);
  KVSWEEP_CHECK(value.has_value())
      << field.full_name() << ": default \"" << rule.default_value() << "\" " << problem.what;
  return value;
}

std::string EnumName(const EnumValueDescriptor& value) {
  // The prefix is the enum's name in upper case with underscores: BudgetBase -> BUDGET_BASE_.
  std::string prefix;
  for (const char c : value.type()->name()) {
    if (absl::ascii_isupper(c) && !prefix.empty()) prefix.push_back('_');
    prefix.push_back(absl::ascii_toupper(c));
  }
  return absl::AsciiStrToLower(absl::StripPrefix(value.name(), absl::StrCat(prefix, "_")));
}

std::vector<std::string> EnumNames(const EnumDescriptor& descriptor) {
  std::vector<std::string> names;
  for (int i = 0; i < descriptor.value_count(); ++i)
    names.push_back(EnumName(*descriptor.value(i)));
  return names;
}

std::string RangeText(const FieldDescriptor& field) {
  const Rule& rule = RuleOf(field);
  const std::string inf = rule.allow_inf() ? ", or inf" : "";
  const std::string min = rule.has_min() ? BoundText(rule.unit(), rule.min()) : "";
  const std::string max = rule.has_max() ? BoundText(rule.unit(), rule.max()) : "";
  if (!min.empty() && !max.empty()) {
    return min == max ? absl::StrCat("of ", min) : absl::StrCat("from ", min, " to ", max, inf);
  }
  if (!min.empty()) return absl::StrCat("of at least ", min, inf);
  if (!max.empty()) return absl::StrCat("of at most ", max, inf);
  return "";
}

std::string TypeText(const FieldDescriptor& field) {
  switch (RuleOf(field).unit()) {
    case UNIT_BYTES:
      return "a size, such as 512KiB, 12MiB or 4096";
    case UNIT_NANOSECONDS:
      return "a duration, such as 250us, 500ms or 2h";
    case UNIT_PER_SECOND:
      return RuleOf(field).allow_inf() ? "a rate, such as 4/s, 90/min or inf"
                                       : "a rate, such as 4/s or 90/min";
    case UNIT_RATIO:
      return "a ratio, such as 0.2 or 20%";
    case UNIT_TOKENS:
      return "a whole number of tokens";
    default:
      break;
  }
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_BOOL:
      return "true or false";
    case FieldDescriptor::CPPTYPE_DOUBLE:
    case FieldDescriptor::CPPTYPE_FLOAT:
      return "a number";
    case FieldDescriptor::CPPTYPE_ENUM:
      return absl::StrCat("one of ", absl::StrJoin(EnumNames(*field.enum_type()), ", "));
    case FieldDescriptor::CPPTYPE_STRING:
      return "a text";
    default:
      return "a whole number";
  }
}

std::vector<std::string> FieldNames(const Descriptor& descriptor) {
  std::vector<std::string> names;
  for (int i = 0; i < descriptor.field_count(); ++i) {
    if (!RuleOf(*descriptor.field(i)).internal()) names.push_back(descriptor.field(i)->name());
  }
  return names;
}

bool HoldsOnlyAxes(const Descriptor& descriptor) {
  for (int i = 0; i < descriptor.field_count(); ++i) {
    if (!RuleOf(*descriptor.field(i)).axes()) return false;
  }
  return descriptor.field_count() > 0;
}

std::string JoinPath(absl::string_view prefix, absl::string_view name) {
  return prefix.empty() ? std::string(name) : absl::StrCat(prefix, ".", name);
}

}  // namespace kvsweep::internal_schema

namespace kvsweep {

using google::protobuf::FieldDescriptor;

absl::StatusOr<std::string> CanonicalValue(const FieldDescriptor& field, absl::string_view text) {
  Problem problem;
  const std::optional<internal_schema::Value> value =
      internal_schema::ParseValue(field, text, &problem);
  if (!value) {
    problem.value = std::string(text);
    return absl::InvalidArgumentError(FormatProblem("", problem));
  }
  return internal_schema::CanonicalText(field, *value);
}

std::string PrettyValue(const FieldDescriptor& field, absl::string_view text) {
  Problem problem;
  const std::optional<internal_schema::Value> value =
      internal_schema::ParseValue(field, text, &problem);
  return value ? internal_schema::PrettyText(field, *value) : std::string(text);
}

}  // namespace kvsweep
