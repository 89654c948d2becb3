#include "worker/engine/token_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "base/random.h"

namespace kvsweep {
namespace {

using ::testing::ElementsAre;

// A version 1 file, its header padded as NumPy pads it.
template <typename Number>
std::string Array(const std::string& type, const std::string& shape,
                  const std::vector<Number>& numbers) {
  std::string header =
      absl::StrCat("{'descr': '", type, "', 'fortran_order': False, 'shape': ", shape, ", }");
  header.resize((10 + header.size() + 64) / 64 * 64 - 10, ' ');
  header.back() = '\n';
  std::string bytes = "\x93NUMPY\x01";
  bytes.push_back('\0');
  bytes.push_back(static_cast<char>(header.size()));
  bytes.push_back(static_cast<char>(header.size() >> 8));
  bytes += header;
  bytes.append(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(Number));
  return bytes;
}

std::string Refusal(absl::string_view bytes, absl::string_view name) {
  const auto ids = ParseTokenFile(bytes, name, 512);
  return ids.ok() ? "accepted" : ids.status().ToString();
}

TEST(TokenFile, ReadsEveryIntegerType) {
  EXPECT_THAT(*ParseTokenFile(Array<uint16_t>("<u2", "(3,)", {1, 2, 511}), "a.npy", 512),
              ElementsAre(1, 2, 511));
  EXPECT_THAT(*ParseTokenFile(Array<uint32_t>("<u4", "(2,)", {7, 0}), "a.npy", 512),
              ElementsAre(7, 0));
  EXPECT_THAT(*ParseTokenFile(Array<int32_t>("<i4", "(1,)", {9}), "a.npy", 512), ElementsAre(9));
  EXPECT_THAT(*ParseTokenFile(Array<int64_t>("<i8", "(2,)", {9, 8}), "a.npy", 512),
              ElementsAre(9, 8));
  EXPECT_THAT(*ParseTokenFile(absl::string_view("\x05\x00\xff\x01", 4), "a.u16", 512),
              ElementsAre(5, 511));
  EXPECT_TRUE(ParseTokenFile("", "a.u16", 512)->empty());
}

TEST(TokenFile, ReadsTheShippedValidationText) {
  const auto bytes = ReadFile("experiments/models/books-llama-14m/val_ids_u16.npy", 1 << 20);
  ASSERT_TRUE(bytes.ok()) << bytes.status();
  const auto ids = ParseTokenFile(*bytes, "val_ids_u16.npy", 4096);
  ASSERT_TRUE(ids.ok()) << ids.status();
  EXPECT_EQ(ids->size(), (bytes->size() - 128) / 2);
}

TEST(TokenFile, TellsTokensFromText) {
  EXPECT_TRUE(IsTokenFile("a/b.npy") && IsTokenFile("b.u16"));
  EXPECT_FALSE(IsTokenFile("moby_dick.txt") || IsTokenFile("npy"));
}

TEST(TokenFile, RefusesWithTheReason) {
  const std::string sound = Array<uint16_t>("<u2", "(3,)", {1, 2, 511});
  EXPECT_EQ(
      Refusal(sound.substr(0, sound.size() - 1), "a.npy"),
      "INVALID_ARGUMENT: a.npy: its header promises 3 numbers of 2 bytes, but 5 bytes follow; "
      "is the file cut short?");
  EXPECT_EQ(Refusal(Array<float>("<f4", "(1,)", {1}), "a.npy"),
            "INVALID_ARGUMENT: a.npy: holds numbers of type '<f4'; token ids must be u2, u4, i4 or "
            "i8, little endian");
  EXPECT_EQ(Refusal(Array<uint16_t>("<u2", "(2, 2)", {1, 2, 3, 4}), "a.npy"),
            "INVALID_ARGUMENT: a.npy: has shape (2, 2); token ids must have one dimension");
  EXPECT_EQ(Refusal(Array<uint16_t>("<u2", "(2,)", {1, 512}), "a.npy"),
            "INVALID_ARGUMENT: a.npy: token 1 has id 512, outside the vocabulary of 512; is it a "
            "file for another model?");
  EXPECT_EQ(Refusal(Array<int64_t>("<i8", "(1,)", {-1}), "a.npy"),
            "INVALID_ARGUMENT: a.npy: token 0 has id -1, outside the vocabulary of 512; is it a "
            "file for another model?");
  EXPECT_EQ(Refusal("not an array", "a.npy"),
            "INVALID_ARGUMENT: a.npy: is no .npy file, or is damaged");
  EXPECT_EQ(Refusal("abc", "a.u16"),
            "INVALID_ARGUMENT: a.u16: has 3 bytes, no whole number of ids");
}

TEST(TokenFile, DamagedFilesAreRefusedOrRead) {
  const uint64_t seed = 20261124;
  SCOPED_TRACE(absl::StrCat("seed ", seed));
  Random random(seed);
  const std::string sound = Array<uint16_t>("<u2", "(40,)", std::vector<uint16_t>(40, 17));
  int refused = 0;
  for (int i = 0; i < 3000; ++i) {
    std::string bytes = sound.substr(0, random.Uniform(sound.size() + 1));
    if (!bytes.empty())
      bytes[random.Uniform(bytes.size())] = static_cast<char>(random.Uniform(256));
    const auto ids = ParseTokenFile(bytes, "a.npy", 512);
    if (!ids.ok()) {
      ++refused;
    } else {
      EXPECT_EQ(ids->size(), 40u);
    }
  }
  EXPECT_GT(refused, 2000);
}

TEST(TokenList, ReadsNumbersHoweverTheyAreWritten) {
  EXPECT_THAT(*ParseTokenList("[1, 2,\n 3]\n", "ids.json", 512), ElementsAre(1, 2, 3));
  EXPECT_THAT(*ParseTokenList("4 5\t6", "ids.txt", 512), ElementsAre(4, 5, 6));
  EXPECT_EQ(ParseTokenList("1 two", "ids.txt", 512).status().message(),
            "ids.txt: token 1 is \"two\", no number");
  EXPECT_EQ(ParseTokenList("600", "ids.txt", 512).status().message(),
            "ids.txt: token 0 has id 600, outside the vocabulary of 512; is it a file for another "
            "model?");
}

}  // namespace
}  // namespace kvsweep
