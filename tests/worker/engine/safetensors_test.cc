#include "worker/engine/safetensors.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/random.h"
#include "tests/worker/engine/model_folder.h"

namespace kvsweep {
namespace {

std::span<const uint8_t> AsBytes(const std::string& text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

// What the reader says to a file of that header and that many bytes of data.
std::string Refusal(const std::string& header, size_t data_bytes) {
  const std::string bytes = SafetensorsBytes(header, std::string(data_bytes, 'x'));
  const auto parsed = ParseSafetensors(AsBytes(bytes), "m.safetensors");
  return parsed.ok() ? "accepted" : parsed.status().ToString();
}

// A half float's value, computed from the definition of the format rather than by moving bits.
double HalfValue(uint16_t half) {
  const double sign = (half & 0x8000) != 0 ? -1.0 : 1.0;
  const int exponent = (half >> 10) & 31;
  const int mantissa = half & 1023;
  if (exponent == 31) return mantissa == 0 ? sign * INFINITY : NAN;
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

TEST(SafetensorsTest, WidensEveryHalfExactly) {
  for (uint32_t half = 0; half <= 0xffff; ++half) {
    const std::array<uint8_t, 2> bytes = {static_cast<uint8_t>(half),
                                          static_cast<uint8_t>(half >> 8)};
    TensorView tensor{.type = DType::kF16, .shape = {}, .bytes = bytes, .file = ""};
    float value = 0;
    WidenTensor(tensor, {&value, 1});
    const double expected = HalfValue(static_cast<uint16_t>(half));
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(value)) << half;
    } else {
      ASSERT_EQ(value, expected) << half;
      ASSERT_EQ(std::signbit(value), std::signbit(expected)) << half;
    }
  }
}

TEST(SafetensorsTest, WidensBfloat16AtAnyAlignment) {
  std::array<uint8_t, 7> bytes = {0, 0x80, 0x3f, 0x00, 0xc0, 0x01, 0x00};  // 1, -2, smallest
  TensorView tensor{.type = DType::kBf16,
                    .shape = {3},
                    .bytes = std::span<const uint8_t>(bytes).subspan(1),
                    .file = ""};
  std::array<float, 3> values{};
  WidenTensor(tensor, values);
  EXPECT_EQ(values[0], 1.0f);
  EXPECT_EQ(values[1], -2.0f);
  EXPECT_EQ(values[2], std::bit_cast<float>(0x00010000));
}

TEST(SafetensorsTest, ReadsWhatWasWritten) {
  const std::string bytes =
      SafetensorsBytes({{"a", {{2, 2}, {1, 2, 3, 4}}}, {"scalar", {{}, {5}}}, {"none", {{0}, {}}}});
  const auto tensors = ParseSafetensors(AsBytes(bytes), "m.safetensors");
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  ASSERT_EQ(tensors->size(), 3u);
  std::array<float, 4> values{};
  WidenTensor(tensors->at("a"), values);
  EXPECT_EQ(values, (std::array<float, 4>{1, 2, 3, 4}));
  EXPECT_EQ(tensors->at("scalar").bytes.size(), 4u);
  EXPECT_TRUE(tensors->at("none").bytes.empty());
}

TEST(SafetensorsTest, OpensTheShippedShards) {
  const auto checkpoint = Checkpoint::Open("experiments/models/books-opt-16m");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->tensors().size(), 132u);
  const TensorView* positions = checkpoint->Find("model.decoder.embed_positions.weight");
  ASSERT_NE(positions, nullptr);
  EXPECT_EQ(positions->type, DType::kBf16);
  EXPECT_EQ(ShapeText(positions->shape), "[2050, 384]");
  EXPECT_EQ(checkpoint->Find("model.decoder.embed_positions"), nullptr);
}

TEST(SafetensorsTest, RefusesDamagedHeaders) {
  EXPECT_EQ(ParseSafetensors(AsBytes("1234567"), "m.safetensors").status().ToString(),
            "DATA_LOSS: m.safetensors: is too short for a safetensors file");
  EXPECT_EQ(ParseSafetensors(AsBytes(std::string(16, '\xff')), "m.safetensors").status().ToString(),
            "DATA_LOSS: m.safetensors: header is said to take 18446744073709551615 bytes; at most "
            "8 are possible");
  EXPECT_EQ(Refusal("{\"a\":", 0), "DATA_LOSS: m.safetensors: its JSON is no object, or damaged");
  EXPECT_EQ(Refusal(absl::StrCat("{\"a\":", std::string(100000, '['), "{\"b\":1}"), 0),
            "DATA_LOSS: m.safetensors: its JSON is no object, or damaged");
  EXPECT_EQ(Refusal("[]", 0), "DATA_LOSS: m.safetensors: its JSON is no object, or damaged");
  EXPECT_EQ(Refusal(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
                        "a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                    8),
            "DATA_LOSS: m.safetensors: \"a\" occurs twice");
  EXPECT_EQ(Refusal(R"({"a":{"dtype":"F32","shape":[1],"shape":[2],"data_offsets":[0,4]}})", 4),
            "DATA_LOSS: m.safetensors: \"shape\" occurs twice");
}

TEST(SafetensorsTest, RefusesTensorsThatDoNotAddUp) {
  EXPECT_EQ(Refusal(R"({"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}})", 4),
            "UNIMPLEMENTED: m.safetensors: tensor a: dtype I8 is not supported; BF16, F16 and F32 "
            "are");
  EXPECT_EQ(Refusal(R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4),
            "DATA_LOSS: m.safetensors: tensor a: shape must hold integers from 0 to "
            "4398046511104");
  EXPECT_EQ(Refusal(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4),
            "DATA_LOSS: m.safetensors: tensor a: data_offsets must be [begin, end]");
  EXPECT_EQ(Refusal(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})", 12),
            "DATA_LOSS: m.safetensors: tensor a: ends at byte 16 of the data, but the file holds "
            "12; is the file cut short?");
  EXPECT_EQ(Refusal(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,16]}})", 16),
            "DATA_LOSS: m.safetensors: tensor a: shape [3] of F32 does not take the 16 bytes of "
            "its data_offsets");
  // 2^40 * 2^40 elements: the product must not wrap round to the size of the data.
  EXPECT_EQ(
      Refusal(R"({"a":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,0]}})",
              0),
      "DATA_LOSS: m.safetensors: tensor a: shape [1099511627776, 1099511627776] of F32 does not "
      "take the 0 bytes of its data_offsets");
}

TEST(SafetensorsTest, RefusesDataThatIsNotTiled) {
  EXPECT_EQ(Refusal(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
                        "b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
                    12),
            "DATA_LOSS: m.safetensors: tensors a and b overlap");
  EXPECT_EQ(Refusal(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
                        "b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}})",
                    12),
            "DATA_LOSS: m.safetensors: the data before tensor b belongs to no tensor");
  EXPECT_EQ(Refusal(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 9),
            "DATA_LOSS: m.safetensors: the last 5 bytes belong to no tensor");
}

// One shard per tensor, and an index that may lie.
std::string OpenWithIndex(const std::string& weight_map) {
  const TempDir folder;
  WriteOrDie(folder, "one.safetensors", SafetensorsBytes({{"a", {{1}, {1}}}}));
  WriteOrDie(folder, "two.safetensors", SafetensorsBytes({{"b", {{1}, {2}}}}));
  WriteOrDie(folder, "both.safetensors", SafetensorsBytes({{"a", {{1}, {1}}}, {"b", {{1}, {2}}}}));
  WriteOrDie(folder, "model.safetensors.index.json",
             absl::StrCat("{\"weight_map\":", weight_map, "}"));
  const auto checkpoint = Checkpoint::Open(folder.path());
  return checkpoint.ok() ? "accepted" : Shown(checkpoint.status(), folder);
}

TEST(SafetensorsTest, HoldsTheIndexToTheShards) {
  const std::string index = "DATA_LOSS: DIR/model.safetensors.index.json: ";
  EXPECT_EQ(OpenWithIndex(R"({"a":"one.safetensors","b":"two.safetensors"})"), "accepted");
  EXPECT_EQ(OpenWithIndex(R"({"a":"two.safetensors","b":"one.safetensors"})"),
            index + "tensor a is not in two.safetensors, where it should be");
  EXPECT_EQ(OpenWithIndex(R"({"a":"both.safetensors"})"),
            index + "tensor b of DIR/both.safetensors is not listed");
  EXPECT_EQ(OpenWithIndex(R"({"a":"both.safetensors","b":"two.safetensors"})"),
            "DATA_LOSS: DIR/two.safetensors: tensor b is also in another shard");
  EXPECT_EQ(OpenWithIndex("[]"), index + "weight_map is missing");
  EXPECT_EQ(OpenWithIndex(R"({"a":"gone.safetensors"})").substr(0, 9), "NOT_FOUND");
}

TEST(SafetensorsTest, IndexCannotLeadOutOfTheFolder) {
  for (const std::string shard :
       {"../one.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", ".hidden"}) {
    EXPECT_EQ(
        OpenWithIndex(absl::StrCat("{\"a\":\"", shard, "\"}")),
        absl::StrCat("INVALID_ARGUMENT: DIR/model.safetensors.index.json: tensor a is said ",
                     "to be in \"", shard, "\"; a shard must be a file of the model's own folder"));
  }
}

TEST(SafetensorsTest, NamesWhatAFolderWithoutWeightsLacks) {
  const TempDir folder;
  EXPECT_EQ(Shown(Checkpoint::Open(folder.path()).status(), folder),
            "NOT_FOUND: model folder DIR has neither model.safetensors nor "
            "model.safetensors.index.json");
}

// Whatever bytes change, every view that is given out lies inside the file and has its size.
TEST(SafetensorsTest, MutatedFilesNeverYieldViewsOutside) {
  const uint64_t seed = 71;
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  Random random(seed);
  const std::string sound =
      SafetensorsBytes({{"a", {{2, 3}, {1, 2, 3, 4, 5, 6}}}, {"b", {{2}, {7, 8}}}});
  int accepted = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string bytes = sound;
    for (uint64_t edits = 1 + random.Uniform(3); edits > 0; --edits) {
      constexpr absl::string_view kLikely = "0123456789[]{},:\"F";
      bytes[random.Uniform(bytes.size())] = random.Bernoulli(0.7)
                                                ? kLikely[random.Uniform(kLikely.size())]
                                                : static_cast<char>(random.Uniform(256));
    }
    if (random.Bernoulli(0.2)) bytes.resize(random.Uniform(bytes.size()));
    const auto tensors = ParseSafetensors(AsBytes(bytes), "m");
    if (!tensors.ok()) continue;
    ++accepted;
    const auto file = AsBytes(bytes);
    for (const auto& [name, tensor] : *tensors) {
      int64_t size = DTypeBytes(tensor.type);
      for (const int64_t dimension : tensor.shape) size *= dimension;
      ASSERT_EQ(static_cast<int64_t>(tensor.bytes.size()), size);
      ASSERT_GE(tensor.bytes.data(), file.data());
      ASSERT_LE(tensor.bytes.data() + size, file.data() + file.size());
    }
  }
  EXPECT_GT(accepted, 0);
}

}  // namespace
}  // namespace kvsweep
