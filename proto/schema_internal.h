// What the files of the schema walker share: rules, single values and their texts. Not for others.
#ifndef KVSWEEP_PROTO_SCHEMA_INTERNAL_H_
#define KVSWEEP_PROTO_SCHEMA_INTERNAL_H_

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/strings/string_view.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/message.h"
#include "google/protobuf/reflection.h"
#include "proto/experiment.pb.h"
#include "proto/schema.h"

namespace kvsweep::internal_schema {

using google::protobuf::Descriptor;
using google::protobuf::EnumDescriptor;
using google::protobuf::EnumValueDescriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

// The rule of a field; an empty one if it has none.
const Rule& RuleOf(const FieldDescriptor& field);

// A plain value of a field: by C++ type of the field. Enums are their number.
struct EnumNumber {
  int number = 0;
  bool operator==(const EnumNumber&) const = default;
};
using Value = std::variant<bool, int64_t, uint64_t, double, EnumNumber, std::string>;

// Reads `text` as a value of `field` and holds it to type, unit, range. On failure fills `what` and
// `remedy` of `problem` and returns nothing.
std::optional<Value> ParseValue(const FieldDescriptor& field, absl::string_view text,
                                Problem* problem);

// Holds a value to the range of `field`, and numbers to be finite. False fills `what` and `remedy`.
bool CheckValue(const FieldDescriptor& field, const Value& value, Problem* problem);

// Access to a single (not repeated) plain field.
Value GetValue(const Message& message, const FieldDescriptor& field);
void SetValue(Message* message, const FieldDescriptor& field, const Value& value);

// One element of a repeated plain field, and one more.
Value GetRepeatedValue(const Message& message, const FieldDescriptor& field, int index);
void AddRepeatedValue(Message* message, const FieldDescriptor& field, const Value& value);

// A value in base units, in a form that ParseValue reads back as the same value.
std::string CanonicalText(const FieldDescriptor& field, const Value& value);

// The same for people: "3MiB", "500ms", "4/s". Exact; ParseValue reads it back as the same value.
std::string PrettyText(const FieldDescriptor& field, const Value& value);

// The default of a field, if its rule has one.
std::optional<Value> DefaultOf(const FieldDescriptor& field);

// "PROCESS_POISSON" of Process -> "poisson".
std::string EnumName(const EnumValueDescriptor& value);
std::vector<std::string> EnumNames(const EnumDescriptor& descriptor);

// "from 0 to 1", "at least 1"; empty without a range.
std::string RangeText(const FieldDescriptor& field);

// What a value of the field looks like, for remedies and the reference: "bytes, for example 6GiB".
std::string TypeText(const FieldDescriptor& field);

// Names of the fields that a spec may have.
std::vector<std::string> FieldNames(const Descriptor& descriptor);

// Whether a message holds nothing but axes, so that these speak about the whole document.
bool HoldsOnlyAxes(const Descriptor& descriptor);

// Checks one axis and returns the field it names. `seen` problems go to `problems` under
// `field_path`.
const FieldDescriptor* FindAxisTarget(const Descriptor& root, absl::string_view path,
                                      Problem* problem);

// Holds axes that advance together to equally many values and to points that differ.
bool CheckTogether(const std::vector<const Axis*>& axes, Problem* problem);

// The axes of a field whose rule is `axes`.
std::vector<const Axis*> AxesOf(const Message& message, const FieldDescriptor& field);

// Path of a member: "arms[1]" + "h2o" -> "arms[1].h2o".
std::string JoinPath(absl::string_view prefix, absl::string_view name);

}  // namespace kvsweep::internal_schema

#endif  // KVSWEEP_PROTO_SCHEMA_INTERNAL_H_
