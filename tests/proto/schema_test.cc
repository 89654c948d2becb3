#include "proto/schema.h"

#include <cmath>
#include <limits>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/random.h"
#include "base/text.h"
#include "gmock/gmock.h"
#include "google/protobuf/descriptor.pb.h"
#include "google/protobuf/dynamic_message.h"
#include "gtest/gtest.h"
#include "proto/experiment.pb.h"
#include "proto/schema_internal.h"

namespace kvsweep {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using internal_schema::RuleOf;
using ::testing::HasSubstr;

// Reads `text` as an Experiment and returns the problems, a line each; empty when there are none.
std::string Problems(absl::string_view text, Experiment* experiment = nullptr,
                     ReadOptions options = {}) {
  Experiment own;
  ProblemList problems;
  ReadText(text, options, experiment == nullptr ? &own : experiment, nullptr, &problems);
  return std::string(problems.ToStatus("s").message());
}

constexpr char kSpec[] = R"(schema_version: 1
name: small
model: {path: m}
load:
  arrivals: {process: poisson, rate: 4/s, requests: 24}
  lengths: {input: 128, output: 16}
kv: {device_bytes: 12MiB}
arms:
  - {name: paged, strategy: paged, paged: {block_size: 16}}
  - name: h2o
    strategy: h2o
    h2o: {heavy_ratio: 20%, recent_ratio: 0.1}
    grid: {h2o.heavy_ratio: [10%, 0.2], kv.device_bytes: [1MiB, 4096]}
sweep: {grid: {load.arrivals.rate: [4/s, inf], engine.batch_invariant: [on, off]}}
slo: {ttft: 500ms, tpot: 1.5ms}
)";

TEST(SchemaRead, ReadsUnitsChoicesAndAxes) {
  Experiment experiment;
  ASSERT_EQ(Problems(kSpec, &experiment), "");
  EXPECT_EQ(experiment.kv().device_bytes(), 12u << 20);
  EXPECT_EQ(experiment.load().arrivals().rate(), 4);
  EXPECT_EQ(experiment.load().arrivals().process(), Arrivals::PROCESS_POISSON);
  EXPECT_EQ(experiment.slo().ttft(), 500'000'000u);
  EXPECT_EQ(experiment.slo().tpot(), 1'500'000u);
  EXPECT_EQ(experiment.arms(1).h2o().heavy_ratio(), 0.2);
  EXPECT_FALSE(experiment.has_repeats()) << "what is not written stays unset";
  ASSERT_EQ(experiment.arms(1).grid_size(), 2);
  EXPECT_EQ(experiment.arms(1).grid(0).values(0), "0.1");
  EXPECT_EQ(experiment.arms(1).grid(1).values(0), "1048576");
  ASSERT_EQ(experiment.sweep().grid_size(), 2);
  EXPECT_EQ(experiment.sweep().grid(0).path(), "load.arrivals.rate");
  EXPECT_THAT(experiment.sweep().grid(0).values(), ::testing::ElementsAre("4/s", "inf"));
  EXPECT_THAT(experiment.sweep().grid(1).values(), ::testing::ElementsAre("true", "false"));
}

TEST(SchemaRead, JsonIsReadAlike) {
  Experiment yaml;
  ASSERT_EQ(Problems(kSpec, &yaml), "");
  Experiment json;
  ASSERT_EQ(Problems(ToPrettyJson(yaml), &json), "");
  EXPECT_EQ(yaml.SerializeAsString(), json.SerializeAsString());
}

TEST(SchemaRead, ManyProblemsAreReportedInOrderWithTheirPlaces) {
  const std::string problems = Problems(R"(schema_version: 2
name: x
model: {pth: m}
load:
  arrivals: {rate: 4, requests: 1.5}
  lengths: []
kv: {device_bytes: 1}
arms: [{name: a, strategy: paged, paged: {block_size: 0}}]
repeats: many
)");
  const std::vector<std::string> expected = {
      "s:1:17: schema_version: value \"2\": above the maximum 1; write a value of 1",
      "s:3:9: model.pth: unknown field; did you mean \"path\"?",
      "s:5:20: load.arrivals.rate: value \"4\": is not a rate, such as 4/s, 90/min or inf",
      "s:5:33: load.arrivals.requests: value \"1.5\": is not a whole number",
      "s:6:12: load.lengths: is a list, not a mapping; write fields: trace, scale, max_total, "
      "input, output, max_output, input_distribution, output_distribution",
      "s:7:20: kv.device_bytes: value \"1\": below the minimum 4KiB; write a value from 4KiB to "
      "909TiB",
      "s:8:55: arms[0].paged.block_size: value \"0\": below the minimum 1; write a value from 1 to "
      "1024",
      "s:9:10: repeats: value \"many\": is not a whole number"};
  EXPECT_EQ(problems, absl::StrJoin(expected, "\n"));
}

// The sweep of the spec, in another's place.
std::string WithSweep(absl::string_view sweep) {
  std::string text(kSpec);
  const size_t begin = text.find("sweep: ");
  return text.replace(begin, text.find('\n', begin) - begin, std::string(sweep));
}

TEST(SchemaRead, ZipAndListAreAxesThatAdvanceTogether) {
  const std::string text = WithSweep(
      "sweep:\n"
      "  grid: {engine.batch_invariant: [on, off]}\n"
      "  zip: {load.arrivals.rate: [4/s, 4/s, 240/min], kv.device_bytes: [1MiB, 2MiB, 3MiB]}\n"
      "  list:\n"
      "    - {load.lengths.input: 8, load.lengths.output: 4}\n"
      "    - {load.lengths.output: 8, load.lengths.input: 8}\n");
  Experiment experiment;
  ASSERT_EQ(Problems(text, &experiment), "");
  ASSERT_EQ(experiment.sweep().zip_size(), 2);
  EXPECT_THAT(experiment.sweep().zip(0).values(), ::testing::ElementsAre("4/s", "4/s", "4/s"));
  ASSERT_EQ(experiment.sweep().list_size(), 2);
  EXPECT_EQ(experiment.sweep().list(1).path(), "load.lengths.output");
  EXPECT_THAT(experiment.sweep().list(0).values(), ::testing::ElementsAre("8", "8"));
  EXPECT_THAT(experiment.sweep().list(1).values(), ::testing::ElementsAre("4", "8"));
  for (const std::string& printed : {ToYaml(experiment), ToPrettyJson(experiment)}) {
    Experiment read;
    ASSERT_EQ(Problems(printed, &read), "") << printed;
    EXPECT_EQ(read.SerializeAsString(), experiment.SerializeAsString()) << printed;
  }
  EXPECT_EQ(ValidateMessage(experiment, "wire"), absl::OkStatus());
  experiment.mutable_sweep()->mutable_zip(1)->mutable_values()->RemoveLast();
  EXPECT_THAT(std::string(ValidateMessage(experiment, "wire").message()),
              HasSubstr("sweep.zip: kv.device_bytes has 2 values and load.arrivals.rate has 3"));
}

TEST(SchemaRead, ZipAndListSayWhatDoesNotAddUp) {
  const auto problems = [](const char* sweep) { return Problems(WithSweep(sweep)); };
  EXPECT_THAT(problems("sweep: {zip: {load.arrivals.rate: [4/s, 8/s], kv.device_bytes: [1MiB]}}"),
              HasSubstr("sweep.zip: kv.device_bytes has 1 values and load.arrivals.rate has 2"));
  EXPECT_THAT(problems("sweep: {zip: {load.arrivals.rate: [4/s, 4/s]}}"),
              HasSubstr("sweep.zip: points 1 and 2 are the same; remove one of them"));
  EXPECT_THAT(problems("sweep: {list: {load.arrivals.rate: [4/s]}}"),
              HasSubstr("sweep.list: is a mapping, not a list; write points as"));
  EXPECT_THAT(problems("sweep: {list: []}"), HasSubstr("sweep.list: empty list"));
  EXPECT_THAT(problems("sweep: {list: [4/s]}"),
              HasSubstr("sweep.list[0]: is a single value, not a mapping"));
  EXPECT_THAT(problems("sweep: {list: [{load.arrivals.rate: 4/s}, {kv.device_bytes: 1MiB}]}"),
              HasSubstr("sweep.list[1]: names kv.device_bytes, which the first point does not"));
  EXPECT_THAT(problems("sweep: {list: [{load.arrivals.rate: 4/s, repeats: 2}, {repeats: 3}]}"),
              HasSubstr("sweep.list[1]: lacks load.arrivals.rate; name the same fields"));
  EXPECT_THAT(problems("sweep: {list: [{load.arrivals.rat: 4/s}]}"),
              HasSubstr("sweep.list.load.arrivals.rat: \"rat\" is an unknown field"));
  EXPECT_THAT(problems("sweep: {list: [{load.arrivals.rate: 4}]}"),
              HasSubstr("sweep.list.load.arrivals.rate: value \"4\": is not a rate"));
}

TEST(SchemaRead, ListsOfNumbersTakeUnitsAndNameTheirEntries) {
  const std::string quality = "quality: {passkey: {depths: [10%, 0.5, 2]}}\n";
  EXPECT_THAT(Problems(absl::StrCat(kSpec, quality)),
              HasSubstr("quality.passkey.depths[2]: value \"2\": above the maximum 1"));
}

TEST(SchemaRead, ListOfProblemsIsBounded) {
  std::string text = "schema_version: 1\n";
  for (int i = 0; i < 500; ++i) absl::StrAppend(&text, "key", i, ": 1\n");
  const std::string problems = Problems(text);
  EXPECT_EQ(std::count(problems.begin(), problems.end(), '\n'), 50);
  EXPECT_THAT(problems, HasSubstr("and 455 more"));
}

TEST(SchemaRead, RefusesWhatCouldExplode) {
  EXPECT_THAT(Problems("a: &x [1]\nb: *x\n"), HasSubstr("anchors (&name) are refused"));
  EXPECT_THAT(Problems("name: !!python/object 3\n"), HasSubstr("tags"));
  EXPECT_THAT(Problems("name: " + std::string(5000, '[') + std::string(5000, ']')),
              HasSubstr("nested deeper than 32 levels"));
  EXPECT_THAT(Problems(std::string(2 << 20, 'a')), HasSubstr("2097152 bytes"));
  EXPECT_THAT(Problems("name: a\n---\nname: b\n"), HasSubstr("a second document"));
  EXPECT_THAT(Problems("name: \xff\xfe\n"), HasSubstr("not UTF-8"));
  EXPECT_THAT(Problems("[1, 2]: 3\n"), HasSubstr("a key must be a plain name"));
  EXPECT_THAT(Problems(""), HasSubstr("is nothing, not a mapping"));
  EXPECT_THAT(Problems("name: \"a\\x07b\"\n"), HasSubstr("control character"));
}

TEST(SchemaRead, SubstitutesVariablesInsideValues) {
  const ReadOptions options = {
      .environment = [](absl::string_view name) -> std::optional<std::string> {
        if (name == "SIZE") return "8MiB";
        if (name == "EVIL") return "x\nrepeats: 7";
        return std::nullopt;
      }};
  Experiment experiment;
  std::string text(kSpec);
  text.replace(text.find("12MiB"), 5, "'${SIZE}'");
  text += "description: ${EVIL}-${NONE:a b}${NONE:}\n";
  ASSERT_EQ(Problems(text, &experiment, options), "");
  EXPECT_EQ(experiment.kv().device_bytes(), 8u << 20);
  EXPECT_EQ(experiment.description(), "x\nrepeats: 7-a b");
  EXPECT_FALSE(experiment.has_repeats()) << "a variable holds a value, never structure";
  EXPECT_THAT(Problems("name: ${NONE}", nullptr, options),
              HasSubstr("environment variable NONE is not set; set it, or write ${NONE:default}"));
  EXPECT_THAT(Problems("kv: {device_bytes: ${SIZE}}", nullptr, options),
              HasSubstr("not valid YAML: end of map flow not found; inside { } and [ ] quote"));
  EXPECT_THAT(Problems("name: ${NONE", nullptr, options), HasSubstr("without \"}\""));
}

// No text may crash the reader: each mutation of a sound spec reads or is refused with a message.
TEST(SchemaRead, SurvivesRandomDamage) {
  const uint64_t seed = 20240611;
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  Random random(seed);
  constexpr char kBytes[] = "{}[]:,&*!|>'\"%@`#-? \n\t0a\xc3";
  for (int round = 0; round < 3000; ++round) {
    std::string text(kSpec);
    const int edits = 1 + static_cast<int>(random.Uniform(6));
    for (int i = 0; i < edits; ++i) {
      const size_t at = random.Uniform(text.size());
      const char c = kBytes[random.Uniform(sizeof(kBytes) - 1)];
      if (random.Bernoulli(0.5)) {
        text[at] = c;
      } else if (random.Bernoulli(0.5)) {
        text.insert(at, 1, c);
      } else {
        text.erase(at, 1 + random.Uniform(10));
      }
    }
    Experiment experiment;
    const std::string problems = Problems(text, &experiment);
    if (problems.empty()) {
      EXPECT_EQ(ValidateMessage(experiment, "wire"), absl::OkStatus()) << text;
    }
  }
}

// ------------------------------------------------------------------- properties over random
// messages

// Fills `message` with random sound values, each field with probability one half (required ones
// always).
void FillRandomly(Random* random, Message* message) {
  const auto* reflection = message->GetReflection();
  for (int i = 0; i < message->GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor& field = *message->GetDescriptor()->field(i);
    const Rule& rule = RuleOf(field);
    if (rule.axes() || (!rule.required() && random->Bernoulli(0.5))) continue;
    if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      FillRandomly(random, field.is_repeated() ? reflection->AddMessage(message, &field)
                                               : reflection->MutableMessage(message, &field));
      continue;
    }
    const double low = rule.has_min() ? rule.min() : 0;
    const double high = std::min(rule.has_max() ? rule.max() : 1e6, 4e9);
    const double drawn = low + random->UniformDouble() * (high - low);
    if (field.is_repeated()) {
      ASSERT_EQ(field.cpp_type(), FieldDescriptor::CPPTYPE_DOUBLE) << field.full_name();
      for (uint64_t k = random->Uniform(4); k <= 4; ++k) {
        reflection->AddDouble(message, &field, low + random->UniformDouble() * (high - low));
      }
      continue;
    }
    switch (field.cpp_type()) {
      case FieldDescriptor::CPPTYPE_BOOL:
        reflection->SetBool(message, &field, random->Bernoulli(0.5));
        break;
      case FieldDescriptor::CPPTYPE_UINT32:
        reflection->SetUInt32(message, &field, static_cast<uint32_t>(drawn));
        break;
      case FieldDescriptor::CPPTYPE_UINT64:
        reflection->SetUInt64(message, &field, static_cast<uint64_t>(drawn));
        break;
      case FieldDescriptor::CPPTYPE_DOUBLE:
        reflection->SetDouble(message, &field,
                              rule.allow_inf() && random->Bernoulli(0.2)
                                  ? std::numeric_limits<double>::infinity()
                                  : drawn);
        break;
      case FieldDescriptor::CPPTYPE_ENUM:
        reflection->SetEnumValue(
            message, &field,
            field.enum_type()
                ->value(static_cast<int>(random->Uniform(field.enum_type()->value_count())))
                ->number());
        break;
      default: {
        constexpr const char* kTexts[] = {
            "a", "a b",    "4",    "true", "null",  "~",  "a: b", "# x", "- y", "\"q\"", "{",  "é€",
            "",  "a\nb\n", "0x1f", "1e3",  "a\\nb", "*x", "'s'",  "%d",  "@",   " lead", "..."};
        reflection->SetString(message, &field, kTexts[random->Uniform(std::size(kTexts))]);
      }
    }
  }
}

TEST(SchemaPrint, PrintedMessagesReadBackEqual) {
  for (uint64_t seed = 1; seed <= 400; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Random random(seed);
    Experiment experiment;
    FillRandomly(&random, &experiment);
    for (const std::string& text : {ToYaml(experiment), ToPrettyJson(experiment)}) {
      Experiment read;
      ASSERT_EQ(Problems(text, &read), "") << text;
      ASSERT_EQ(read.SerializeAsString(), experiment.SerializeAsString()) << text;
    }
  }
}

TEST(SchemaPrint, CanonicalFormIsBlindToDefaultsAndNothingElse) {
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Random random(seed);
    Experiment experiment;
    FillRandomly(&random, &experiment);
    Experiment filled = experiment;
    ApplyDefaults(&filled);
    EXPECT_EQ(CanonicalJson(filled), CanonicalJson(experiment));
    Experiment other = filled;
    other.set_repeats(filled.repeats() == 1000 ? 1 : filled.repeats() + 1);
    EXPECT_NE(CanonicalJson(other), CanonicalJson(filled));
    other = filled;
    other.mutable_load()->mutable_arrivals()->set_seed(filled.load().arrivals().seed() + 1);
    EXPECT_NE(CanonicalJson(other), CanonicalJson(filled));
  }
}

TEST(SchemaPrint, CanonicalFormUsesBaseUnitsAndSortedKeys) {
  Experiment experiment;
  ASSERT_EQ(Problems(kSpec, &experiment), "");
  EXPECT_EQ(CanonicalJson(experiment.slo()), R"({"tpot":1500000,"ttft":500000000})");
  EXPECT_EQ(CanonicalJson(experiment.arms(0)), R"({"name":"paged","strategy":"paged"})");
  EXPECT_EQ(CanonicalJson(experiment.sweep()),
            R"({"grid":[{"path":"load.arrivals.rate","values":["4/s","inf"]},)"
            R"({"path":"engine.batch_invariant","values":["true","false"]}]})");
}

// ------------------------------------------------------------------------------------ fields by
// path

TEST(SchemaPaths, SetFieldReadsUnitsAndMakesTheWay) {
  Experiment experiment;
  ASSERT_TRUE(SetField(&experiment, "kv.device_bytes", "12MiB").ok());
  ASSERT_TRUE(SetField(&experiment, "load.arrivals.process", "closed").ok());
  EXPECT_EQ(experiment.kv().device_bytes(), 12u << 20);
  EXPECT_EQ(experiment.load().arrivals().process(), Arrivals::PROCESS_CLOSED);
  const auto message = [&](const char* path, const char* text) {
    return std::string(SetField(&experiment, path, text).message());
  };
  EXPECT_EQ(message("kv.device_byte", "1"),
            "kv.device_byte: \"device_byte\" is an unknown field; did you mean \"device_bytes\"?");
  EXPECT_THAT(message("arms.name", "x"), HasSubstr("is a list"));
  EXPECT_THAT(message("kv", "x"), HasSubstr("group of fields"));
  EXPECT_THAT(message("name.x", "x"), HasSubstr("has no fields"));
  EXPECT_THAT(message("", "x"), HasSubstr("unknown field"));
  EXPECT_THAT(message("repeats", "0"), HasSubstr("below the minimum 1"));
  EXPECT_THAT(message("repeats", "-1"), HasSubstr("not a whole number"));
  EXPECT_THAT(message("repeats", "99999999999"), HasSubstr("write a value up to"));
  EXPECT_THAT(message("load.arrivals.process", "poisso"), HasSubstr("did you mean \"poisson\"?"));
}

TEST(SchemaPaths, PrettyValuesAreExact) {
  const auto field = [](const char* path) { return *FindField(*Experiment::descriptor(), path); };
  EXPECT_EQ(PrettyValue(*field("kv.device_bytes"), "3145728"), "3MiB");
  EXPECT_EQ(PrettyValue(*field("kv.device_bytes"), "3145729"), "3145729B");
  EXPECT_EQ(PrettyValue(*field("slo.ttft"), "1500us"), "1500us");
  EXPECT_EQ(PrettyValue(*field("slo.ttft"), "120s"), "2min");
  EXPECT_EQ(PrettyValue(*field("load.arrivals.rate"), "90/min"), "1.5/s");
  EXPECT_EQ(*CanonicalValue(*field("slo.ttft"), "1.5ms"), "1500000ns");
  EXPECT_EQ(*CanonicalValue(*field("load.arrivals.rate"), ".inf"), "inf");
}

// --------------------------------------------------------------------------------- the wire, the
// rules

TEST(SchemaWire, RefusesWhatTheRulesForbid) {
  Experiment sound;
  ASSERT_EQ(Problems(kSpec, &sound), "");
  EXPECT_EQ(ValidateMessage(sound, "wire"), absl::OkStatus());
  const auto broken = [&](auto edit) {
    Experiment experiment = sound;
    edit(&experiment);
    return std::string(ValidateMessage(experiment, "wire").message());
  };
  EXPECT_EQ(broken([](Experiment* e) { e->set_repeats(0); }),
            "wire: repeats: value \"0\": below the minimum 1; write a value from 1 to 1000");
  EXPECT_EQ(broken([](Experiment* e) { e->clear_arms(); }),
            "wire: arms: missing; give it: The configurations to compare.");
  EXPECT_THAT(broken([](Experiment* e) { e->mutable_load()->mutable_arrivals()->set_rate(NAN); }),
              HasSubstr("load.arrivals.rate: value \"nan\": not a finite number"));
  EXPECT_THAT(broken([](Experiment* e) { e->mutable_kv()->set_dtype(static_cast<Kv::Dtype>(9)); }),
              HasSubstr("kv.dtype: value \"9\": is none of the choices"));
  EXPECT_THAT(broken([](Experiment* e) { e->set_description(std::string(100'000, 'x')); }),
              HasSubstr("description: text of 100000 bytes"));
  EXPECT_THAT(
      broken([](Experiment* e) { e->mutable_sweep()->mutable_grid(0)->set_values(0, "4 /min"); }),
      HasSubstr("not in base units"));
  EXPECT_THAT(
      broken([](Experiment* e) { e->mutable_sweep()->mutable_grid(0)->set_path("name.x"); }),
      HasSubstr("has no fields"));
  EXPECT_THAT(broken([](Experiment* e) { e->mutable_sweep()->mutable_grid(0)->clear_values(); }),
              HasSubstr("0 values"));
  EXPECT_THAT(
      broken([](Experiment* e) { e->GetReflection()->MutableUnknownFields(e)->AddVarint(999, 1); }),
      HasSubstr("does not know"));
}

TEST(SchemaWire, ChecksRecordsWithoutRules) {
  Record record;
  record.mutable_counter()->set_name("steps");
  EXPECT_EQ(ValidateMessage(record, "row"), absl::OkStatus());
  record.mutable_counter()->set_value(std::numeric_limits<double>::infinity());
  EXPECT_THAT(std::string(ValidateMessage(record, "row").message()),
              HasSubstr("counter.value: value \"inf\": not a finite number"));
}

// Calls `visit` for each field of `descriptor` and of the messages below it.
template <typename Visit>
void ForEachField(const Descriptor& descriptor, const Visit& visit) {
  for (int i = 0; i < descriptor.field_count(); ++i) {
    visit(*descriptor.field(i));
    if (descriptor.field(i)->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE &&
        !RuleOf(*descriptor.field(i)).axes()) {
      ForEachField(*descriptor.field(i)->message_type(), visit);
    }
  }
}

TEST(SchemaRules, EveryFieldIsDescribedAndEveryDefaultIsSound) {
  ForEachField(*Experiment::descriptor(), [](const FieldDescriptor& field) {
    SCOPED_TRACE(field.full_name());
    const Rule& rule = RuleOf(field);
    EXPECT_FALSE(rule.help().empty());
    EXPECT_TRUE(!rule.required() || rule.default_value().empty());
    if (!rule.default_value().empty()) internal_schema::DefaultOf(field);  // aborts when unsound
    const bool plain = field.cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE;
    EXPECT_TRUE(!plain || field.is_repeated() || field.has_presence());
    EXPECT_TRUE(rule.axes() || !(rule.together() || rule.points()));
  });
}

TEST(SchemaRules, InternalFieldsAreRefused) {
  google::protobuf::FileDescriptorProto file;
  file.set_name("internal_test.proto");
  file.set_syntax("proto3");
  auto* type = file.add_message_type();
  type->set_name("Own");
  auto* field = type->add_field();
  field->set_name("secret");
  field->set_number(1);
  field->set_type(google::protobuf::FieldDescriptorProto::TYPE_STRING);
  field->mutable_options()->MutableExtension(rule)->set_internal(true);
  google::protobuf::DescriptorPool pool(google::protobuf::DescriptorPool::generated_pool());
  const Descriptor* descriptor = pool.BuildFile(file)->FindMessageTypeByName("Own");
  google::protobuf::DynamicMessageFactory factory;
  std::unique_ptr<Message> message(factory.GetPrototype(descriptor)->New());
  ProblemList problems;
  EXPECT_FALSE(ReadText("secret: x\n", {}, message.get(), nullptr, &problems));
  EXPECT_THAT(std::string(problems.ToStatus("s").message()), HasSubstr("is set by kvsweep itself"));
}

TEST(SchemaReference, NamesEveryField) {
  const std::string markdown = ReferenceMarkdown(*Experiment::descriptor());
  const std::string text = ReferenceText(*Experiment::descriptor());
  const std::string schema = JsonSchema(*Experiment::descriptor());
  ForEachField(*Experiment::descriptor(), [&](const FieldDescriptor& field) {
    EXPECT_THAT(markdown, HasSubstr(absl::StrCat("| `", field.name(), "` |")));
    EXPECT_THAT(text, HasSubstr(absl::StrCat("  ", field.name())));
    EXPECT_THAT(schema, HasSubstr(absl::StrCat("\"", field.name(), "\": {")));
  });
  // The schema is JSON, hence readable by our own reader as far as its syntax goes.
  Experiment experiment;
  EXPECT_FALSE(absl::StrContains(Problems(schema, &experiment), "not valid YAML"));
}

TEST(SchemaPaths, FindsNamedFiles) {
  Experiment experiment;
  std::string text(kSpec);
  text.replace(text.find("sweep: {grid: {"), 15, "sweep: {grid: {load.text: [a.txt, b.txt], ");
  ASSERT_EQ(Problems(text, &experiment), "");
  std::vector<std::string> found;
  for (const NamedPath& path : FindNamedPaths(experiment)) {
    found.push_back(absl::StrCat(path.field, "=", path.value, path.folder ? "/" : ""));
  }
  EXPECT_THAT(found, ::testing::UnorderedElementsAre("model.path=m/", "sweep.grid.load.text=a.txt",
                                                     "sweep.grid.load.text=b.txt"));
  EXPECT_THAT(StrategyNames(*Arm::descriptor()),
              ::testing::ElementsAre("paged", "h2o", "infinigen", "streaming_llm"));
}

TEST(SourceMapTest, FallsBackToWhatIsAround) {
  SourceMap map;
  map.Set("", {1, 1});
  map.Set("arms[1]", {4, 5});
  EXPECT_EQ(map.Find("arms[1].h2o.heavy_ratio").line, 4);
  EXPECT_EQ(map.Find("arms[0].h2o").line, 1);
  EXPECT_EQ(map.Find("kv").line, 1);
}

}  // namespace
}  // namespace kvsweep
