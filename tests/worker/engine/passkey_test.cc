#include "worker/engine/passkey.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/file.h"
#include "tests/worker/engine/stories_model.h"

namespace kvsweep {
namespace {

using testing::HasSubstr;

constexpr int32_t kContext = 512;

Passkey Asked(std::vector<double> depths, uint32_t prompts, Passkey::Question question) {
  Passkey passkey;
  for (const double depth : depths) passkey.add_depths(depth);
  passkey.set_prompts(prompts);
  passkey.set_digits(5);
  passkey.set_distractors(0);
  passkey.set_question(question);
  return passkey;
}

class PasskeyTest : public testing::Test {
 protected:
  PasskeyTest() {
    absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer =
        LoadTokenizer("experiments/models/books-llama-14m");
    KVSWEEP_CHECK_OK(tokenizer);
    tokenizer_ = *std::move(tokenizer);
    text_ = *tokenizer_->Encode(
        ReadFile("experiments/data/moby_dick.txt", int64_t{4} << 20)->substr(0, 100'000));
  }

  std::vector<PasskeyPrompt> Prompts(const Passkey& passkey, int32_t context = kContext) {
    absl::StatusOr<std::vector<PasskeyPrompt>> prompts =
        MakePasskeyPrompts(passkey, *tokenizer_, text_, tokenizer_->bos_id(), context);
    KVSWEEP_CHECK_OK(prompts);
    return *std::move(prompts);
  }

  std::string TextOf(const PasskeyPrompt& prompt) const {
    return *tokenizer_->Decode(prompt.tokens);
  }

  std::unique_ptr<Tokenizer> tokenizer_;
  std::vector<int32_t> text_;
};

TEST_F(PasskeyTest, TheKeyStandsOnceAtItsDepthAndIsAskedForAtTheEnd) {
  for (const auto question : {Passkey::QUESTION_AFTER_PREFILL, Passkey::QUESTION_IN_PROMPT}) {
    const std::vector<PasskeyPrompt> prompts = Prompts(Asked({0, 0.5, 1}, 4, question));
    ASSERT_EQ(prompts.size(), 12u);
    for (size_t i = 0; i < prompts.size(); ++i) {
      const PasskeyPrompt& prompt = prompts[i];
      EXPECT_EQ(prompt.context(), kContext);
      EXPECT_EQ(prompt.tokens.front(), *tokenizer_->bos_id());
      const std::string text = TextOf(prompt);
      const std::string digits = *tokenizer_->Decode(prompt.answer);
      ASSERT_EQ(digits.size(), 5u) << digits;
      const size_t at = text.find(absl::StrCat(" is", digits, " .\n"));
      ASSERT_NE(at, std::string::npos) << text;
      // The share of the text before it: sentences and question make it inexact.
      EXPECT_NEAR(static_cast<double>(at) / static_cast<double>(text.size()), prompt.depth, 0.12);
      EXPECT_EQ(text.find(digits, at + 10), std::string::npos) << "told twice";
      EXPECT_THAT(text, HasSubstr("\nWhat is the pass key of "));
      EXPECT_TRUE(absl::EndsWith(text, " is")) << text;
      const std::string prefilled =
          *tokenizer_->Decode(std::span(prompt.tokens).first(static_cast<size_t>(prompt.prefill)));
      EXPECT_EQ(absl::StrContains(prefilled, "What is the pass key"),
                question == Passkey::QUESTION_IN_PROMPT);
      EXPECT_EQ(prompt.counted_from, question == Passkey::QUESTION_IN_PROMPT ? 1 : 0);
      EXPECT_EQ(prompt.answer, prompts[i % 4].answer) << "the same at every depth";
    }
    EXPECT_NE(prompts[0].answer, prompts[1].answer);
  }
}

TEST_F(PasskeyTest, DistractorsAreOthers) {
  Passkey passkey = Asked({0.5}, 8, Passkey::QUESTION_AFTER_PREFILL);
  passkey.set_distractors(3);
  for (const PasskeyPrompt& prompt : Prompts(passkey)) {
    EXPECT_EQ(prompt.context(), kContext);
    std::vector<std::string> told = absl::StrSplit(TextOf(prompt), "\nThe pass key of ");
    ASSERT_EQ(told.size(), 5u);
    const std::string question =
        told.back().substr(told.back().find("What is the pass key of ") + 24);
    const std::string name = question.substr(0, question.find('?'));
    int named = 0;
    for (size_t i = 1; i < told.size(); ++i) named += absl::StartsWith(told[i], name + " is");
    EXPECT_EQ(named, 1) << name;
  }
}

TEST_F(PasskeyTest, DigitsCountInPlace) {
  PasskeyPrompt prompt{.answer = {10, 11, 12, 13}, .digit_end = {1, 3, 4}};
  EXPECT_EQ(CorrectDigits(prompt, std::vector<int32_t>{10, 11, 12, 13}), 3);
  EXPECT_EQ(CorrectDigits(prompt, std::vector<int32_t>{10, 11, 99, 13}), 2) << "half a digit";
  EXPECT_EQ(CorrectDigits(prompt, std::vector<int32_t>{11, 12, 13, 10}), 0) << "displaced";
  prompt.counted_from = 1;
  EXPECT_EQ(CorrectDigits(prompt, std::vector<int32_t>{99, 11, 12, 13}), 2);
}

TEST_F(PasskeyTest, WhatCannotBeAskedIsRefused) {
  const Passkey passkey = Asked({0.5}, 1, Passkey::QUESTION_AFTER_PREFILL);
  const auto refusal = [&](std::span<const int32_t> text, int32_t context) {
    return std::string(MakePasskeyPrompts(passkey, *tokenizer_, text, tokenizer_->bos_id(), context)
                           .status()
                           .message());
  };
  EXPECT_THAT(refusal(text_, 32), HasSubstr("quality.context: 32"));
  EXPECT_THAT(refusal(std::span(text_).first(100), 512), HasSubstr("take a longer text"));
}

// Recall by the real model, with the real state: what the books models were trained for.
class RecallTest : public PasskeyTest {
 protected:
  RecallTest() : backend_(*CreateCpuBackend({.threads = 2})) {
    model_ = *LoadedModel::Load(backend_.get(), "experiments/models/books-llama-14m");
  }

  std::vector<PasskeyRow> Recall(const Arm& arm, const std::vector<PasskeyPrompt>& prompts,
                                 std::vector<std::vector<int32_t>>* known) {
    auto engine = *InferenceEngine::Create(backend_.get(), model_.get(), arm,
                                           {.max_sequences = 4,
                                            .max_batched_tokens = 512,
                                            .max_context = kContext,
                                            .logits = LogitsMode::kLast,
                                            .device_bytes = uint64_t{64} << 20,
                                            .host_bytes = uint64_t{64} << 20},
                                           {});
    std::unique_ptr<InferenceEngine> reference;
    if (known->empty()) {
      reference = *InferenceEngine::Create(
          backend_.get(), model_.get(), PagedArm(),
          PasskeyReferenceOptions(model_->config(), kContext, 4, DType::kF32), {});
    }
    std::vector<PasskeyRow> rows;
    const auto end = RecallPasskeys(reference.get(), engine.get(), prompts, 4,
                                    {.clock = &RealClock::Get()}, known, [&](PasskeyRow row) {
                                      rows.push_back(std::move(row));
                                      return true;
                                    });
    EXPECT_TRUE(end.ok()) << end.status();
    EXPECT_EQ(engine->manager().ReservedBytes(), engine->manager().FixedBytes());
    return rows;
  }

  std::unique_ptr<Backend> backend_;
  std::unique_ptr<LoadedModel> model_;
};

TEST_F(RecallTest, TheFullCacheRecallsAndAWindowForgets) {
  for (const auto question : {Passkey::QUESTION_AFTER_PREFILL, Passkey::QUESTION_IN_PROMPT}) {
    const std::vector<PasskeyPrompt> prompts = Prompts(Asked({0.2, 1}, 3, question));
    std::vector<std::vector<int32_t>> known;
    const std::vector<PasskeyRow> full = Recall(PagedArm(), prompts, &known);
    const std::vector<PasskeyRow> window =
        Recall(H2oArm(0, 1, BUDGET_BASE_FIXED, 64), prompts, &known);
    ASSERT_EQ(full.size(), 6u);
    ASSERT_EQ(window.size(), 6u);
    uint32_t recalled = 0;
    uint32_t early = 0;
    for (size_t i = 0; i < 6; ++i) {
      EXPECT_EQ(full[i].digits(), question == Passkey::QUESTION_IN_PROMPT ? 4u : 5u);
      EXPECT_EQ(full[i].correct_digits(), full[i].reference_correct_digits());
      EXPECT_EQ(full[i].recalled(), full[i].reference_recalled());
      EXPECT_EQ(window[i].reference_recalled(), full[i].reference_recalled()) << "from memory";
      recalled += full[i].recalled();
      if (i < 3) early += window[i].recalled();
    }
    EXPECT_GE(recalled, 5u) << "the model was trained for it";
    EXPECT_EQ(early, 0u) << "300 tokens back, 64 kept";
  }
}

}  // namespace
}  // namespace kvsweep
