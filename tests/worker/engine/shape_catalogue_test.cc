#include "worker/engine/shape_catalogue.h"

#include <gtest/gtest.h>

#include <map>
#include <string>

#include "worker/engine/weights.h"

namespace kvsweep {
namespace {

// The numbers of parameters that the models were published with: one wrong dimension anywhere
// would show in them.
TEST(ShapeCatalogueTest, ParameterCountsAreThePublishedOnes) {
  const std::map<std::string, int64_t> published = {
      {"opt-125m", 125'239'296},       {"opt-1.3b", 1'315'758'080},
      {"opt-2.7b", 2'651'596'800},     {"opt-6.7b", 6'658'473'984},
      {"opt-13b", 12'853'473'280},     {"opt-30b", 29'974'540'288},
      {"llama-2-7b", 6'738'415'616},   {"llama-2-13b", 13'015'864'320},
      {"llama-3.1-8b", 8'030'261'248}, {"opt-350m", 331'196'416},
      {"opt-66b", 65'719'701'504},     {"opt-175b", 174'604'468'224},
      {"llama-2-70b", 68'976'648'192}, {"llama-3.1-70b", 70'553'706'496},
      {"qwen2.5-7b", 7'615'616'512},
  };
  for (const auto& [name, parameters] : published) {
    const auto config = FindShape(name);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(ParameterCount(*config), parameters) << name;
  }
}

TEST(ShapeCatalogueTest, KvBytesPerTokenAreThoseOfThePapers) {
  const std::map<std::string, int64_t> kibibytes = {
      {"opt-125m", 36},      {"opt-1.3b", 192},      {"opt-2.7b", 320},   {"opt-6.7b", 512},
      {"opt-13b", 800},      {"opt-30b", 1344},      {"llama-2-7b", 512}, {"llama-2-13b", 800},
      {"llama-3.1-8b", 128}, {"opt-350m", 96},       {"opt-66b", 2304},   {"opt-175b", 4608},
      {"llama-2-70b", 320},  {"llama-3.1-70b", 320}, {"qwen2.5-7b", 56},
  };
  for (const auto& [name, expected] : kibibytes) {
    EXPECT_EQ(FindShape(name)->KvBytesPerToken(DType::kF16), expected * 1024) << name;
  }
}

TEST(ShapeCatalogueTest, EveryShapeIsSound) {
  for (const std::string& name : ShapeNames()) {
    const auto config = FindShape(name);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_TRUE(CheckModelConfig(*config, name).ok()) << CheckModelConfig(*config, name);
  }
}

// A name of the catalogue without a published figure above would be checked by nothing.
TEST(ShapeCatalogueTest, ListsTheModelsOfThePapersAndTwoOfOurs) {
  EXPECT_EQ(ShapeNames().size(), 15u + 2u);
}

TEST(ShapeCatalogueTest, PositionsReachAsFarAsAsked) {
  ModelConfig config = *FindShape("opt-125m");
  const int64_t parameters = ParameterCount(config);
  ExtendPositions(1000, &config);
  EXPECT_EQ(config.max_positions, 2048);
  ExtendPositions(5000, &config);
  EXPECT_EQ(config.max_positions, 5000);
  EXPECT_EQ(ParameterCount(config) - parameters, (5000 - 2048) * 768);
}

TEST(ShapeCatalogueTest, UnknownNamesGetAHint) {
  EXPECT_EQ(FindShape("lama-3.1-8b").status().ToString(),
            "NOT_FOUND: unknown model shape \"lama-3.1-8b\"; did you mean \"llama-3.1-8b\"?");
  EXPECT_EQ(FindShape("z").status().ToString(),
            "NOT_FOUND: unknown model shape \"z\"; known are tiny-opt, opt-125m, opt-350m, "
            "opt-1.3b, opt-2.7b, opt-6.7b, opt-13b, opt-30b, opt-66b, opt-175b, tiny-llama, "
            "llama-2-7b, llama-2-13b, llama-2-70b, llama-3.1-8b, llama-3.1-70b, qwen2.5-7b");
}

}  // namespace
}  // namespace kvsweep
