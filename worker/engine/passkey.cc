#include "worker/engine/passkey.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/random.h"
#include "base/status_macros.h"

namespace kvsweep {
namespace {

// Any fixed number: the prompts are part of the method.
constexpr uint64_t kPromptSeed = 0x706173736b6579;

constexpr std::array<const char*, 68> kNames = {
    "Adam",   "Agnes",  "Albert", "Alice",  "Andrew", "Anna",   "Arthur",  "Barbara", "Ben",
    "Bertha", "Cecil",  "Clara",  "Daniel", "David",  "Dora",   "Edith",   "Edmund",  "Edward",
    "Ellen",  "Emma",   "Ernest", "Esther", "Eva",    "Fanny",  "Felix",   "Flora",   "Francis",
    "Frank",  "George", "Grace",  "Hannah", "Harold", "Harry",  "Helen",   "Henry",   "Hester",
    "Hugh",   "Ida",    "Isaac",  "Jack",   "James",  "Jane",   "John",    "Joseph",  "Julia",
    "Kate",   "Laura",  "Lewis",  "Lucy",   "Mark",   "Martha", "Mary",    "Michael", "Nancy",
    "Oliver", "Oscar",  "Paul",   "Peter",  "Philip", "Ralph",  "Richard", "Robert",  "Rose",
    "Ruth",   "Sarah",  "Simon",  "Thomas", "Walter"};

// A person and the number that is theirs.
struct Secret {
  std::string name;
  std::string digits;
};

// The ids of `text` as it stands behind other text: a tokenizer may put a mark before a text's
// beginning.
absl::StatusOr<std::vector<int32_t>> EncodeBehind(const Tokenizer& tokenizer,
                                                  absl::string_view text) {
  ASSIGN_OR_RETURN(const std::vector<int32_t> before, tokenizer.Encode("and"));
  ASSIGN_OR_RETURN(std::vector<int32_t> ids, tokenizer.Encode(absl::StrCat("and", text)));
  if (ids.size() <= before.size() || !std::equal(before.begin(), before.end(), ids.begin())) {
    return absl::InvalidArgumentError(
        absl::StrCat("quality.passkey: this model's tokenizer joins \"", text,
                     "\" with what stands before; pass keys cannot be asked of it"));
  }
  ids.erase(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(before.size()));
  return ids;
}

// A question and its answer, divided digit by digit. The digits stand directly behind "is", each
// encoded alone, as in the texts that the books models were trained on.
struct Asking {
  std::vector<int32_t> telling;
  std::vector<int32_t> question;
  std::vector<int32_t> answer;
  std::vector<int32_t> digit_end;
};

absl::StatusOr<Asking> EncodeAsking(const Tokenizer& tokenizer, const Secret& secret) {
  const std::string sentence = absl::StrCat("The pass key of ", secret.name, " is");
  Asking asking;
  ASSIGN_OR_RETURN(asking.telling, EncodeBehind(tokenizer, absl::StrCat("\n", sentence)));
  ASSIGN_OR_RETURN(asking.question,
                   EncodeBehind(tokenizer, absl::StrCat("\nWhat is the pass key of ", secret.name,
                                                        "? ", sentence)));
  for (const char digit : secret.digits) {
    ASSIGN_OR_RETURN(const std::vector<int32_t> ids,
                     EncodeBehind(tokenizer, absl::string_view(&digit, 1)));
    asking.answer.insert(asking.answer.end(), ids.begin(), ids.end());
    asking.digit_end.push_back(static_cast<int32_t>(asking.answer.size()));
  }
  ASSIGN_OR_RETURN(const std::vector<int32_t> end, EncodeBehind(tokenizer, " .\n"));
  asking.telling.insert(asking.telling.end(), asking.answer.begin(), asking.answer.end());
  asking.telling.insert(asking.telling.end(), end.begin(), end.end());
  return asking;
}

// People with different names, the one who is asked for first.
std::vector<Secret> DrawSecrets(Random& random, size_t count, uint32_t digits) {
  std::vector<const char*> names(kNames.begin(), kNames.end());
  random.Shuffle(std::span<const char*>(names));
  std::vector<Secret> secrets;
  for (size_t i = 0; i < count; ++i) {
    Secret secret{.name = names[i], .digits = ""};
    for (uint32_t d = 0; d < digits; ++d) absl::StrAppend(&secret.digits, random.Uniform(10));
    secrets.push_back(std::move(secret));
  }
  return secrets;
}

// A sentence and where it stands in the filler.
struct Insertion {
  double depth = 0;
  std::vector<int32_t> tokens;
};

// Filler with the sentences put in, by depth.
std::vector<int32_t> Weave(std::span<const int32_t> filler, std::vector<Insertion> insertions) {
  std::stable_sort(insertions.begin(), insertions.end(),
                   [](const Insertion& a, const Insertion& b) { return a.depth < b.depth; });
  std::vector<int32_t> tokens;
  size_t taken = 0;
  const auto take_until = [&](size_t end) {
    tokens.insert(tokens.end(), filler.begin() + static_cast<std::ptrdiff_t>(taken),
                  filler.begin() + static_cast<std::ptrdiff_t>(end));
    taken = end;
  };
  for (const Insertion& insertion : insertions) {
    take_until(
        static_cast<size_t>(std::floor(insertion.depth * static_cast<double>(filler.size()))));
    tokens.insert(tokens.end(), insertion.tokens.begin(), insertion.tokens.end());
  }
  take_until(filler.size());
  return tokens;
}

// What one engine does with one group of prompts.
class Answering {
 public:
  Answering(InferenceEngine* engine, std::span<const PasskeyPrompt> prompts,
            const StepObserver& observer)
      : engine_(*engine), prompts_(prompts), observer_(observer), held_(prompts.size()) {}

  absl::StatusOr<std::vector<std::vector<int32_t>>> Run() {
    for (size_t i = 0; i < prompts_.size(); ++i) {
      const PasskeyPrompt& prompt = prompts_[i];
      engine_.AddSequence(static_cast<RequestId>(i), prompt.tokens, prompt.prefill);
      RETURN_IF_ERROR(
          PrefillPrompt(&engine_, static_cast<RequestId>(i), prompt.shape(), observer_).status());
      held_[i] = prompt.prefill;
    }
    while (true) {
      ASSIGN_OR_RETURN(const bool stepped, Step());
      if (!stepped) break;
    }
    std::vector<std::vector<int32_t>> answers;
    for (size_t i = 0; i < prompts_.size(); ++i) {
      const auto tokens =
          engine_.Tokens(static_cast<RequestId>(i)).subspan(prompts_[i].tokens.size());
      answers.emplace_back(tokens.begin(), tokens.end());
      RemoveSequence(&engine_, static_cast<RequestId>(i));
    }
    return answers;
  }

 private:
  // Feeds one token to each sequence whose answer is not whole yet; false: there is none.
  absl::StatusOr<bool> Step() {
    StepPlan plan;
    for (size_t i = 0; i < prompts_.size(); ++i) {
      const auto id = static_cast<RequestId>(i);
      if (static_cast<int32_t>(engine_.Tokens(id).size()) >= prompts_[i].context()) continue;
      RETURN_IF_ERROR(HoldTokens(&engine_, id, prompts_[i].shape(), held_[i], 1));
      plan.decode.push_back({.request = id,
                             .slot = id,
                             .first_row = static_cast<int32_t>(plan.decode.size()),
                             .rows = 1,
                             .start_position = held_[i]++});
    }
    if (plan.decode.empty()) return false;
    ASSIGN_OR_RETURN(const StepResult step, engine_.Execute(plan));
    if (observer_) observer_(step);
    return true;
  }

  InferenceEngine& engine_;
  std::span<const PasskeyPrompt> prompts_;
  const StepObserver& observer_;
  std::vector<int32_t> held_;  // tokens in the cache, by prompt
};

PasskeyRow RowOf(size_t index, const PasskeyPrompt& prompt, std::span<const int32_t> answer,
                 std::span<const int32_t> reference) {
  const int32_t digits = static_cast<int32_t>(prompt.digit_end.size()) - prompt.counted_from;
  PasskeyRow row;
  row.set_index(static_cast<uint32_t>(index));
  row.set_depth(prompt.depth);
  row.set_context_tokens(static_cast<uint32_t>(prompt.context()));
  row.set_digits(static_cast<uint32_t>(digits));
  row.set_correct_digits(static_cast<uint32_t>(CorrectDigits(prompt, answer)));
  row.set_recalled(CorrectDigits(prompt, answer) == digits);
  row.set_reference_correct_digits(static_cast<uint32_t>(CorrectDigits(prompt, reference)));
  row.set_reference_recalled(CorrectDigits(prompt, reference) == digits);
  return row;
}

}  // namespace

absl::StatusOr<std::vector<PasskeyPrompt>> MakePasskeyPrompts(const Passkey& passkey,
                                                              const Tokenizer& tokenizer,
                                                              std::span<const int32_t> text_ids,
                                                              std::optional<int32_t> bos_id,
                                                              int32_t context) {
  KVSWEEP_CHECK_LT(passkey.distractors(), kNames.size());
  const bool in_prompt = passkey.question() == Passkey::QUESTION_IN_PROMPT;
  std::vector<PasskeyPrompt> prompts;
  for (const double depth : passkey.depths()) {
    for (uint32_t j = 0; j < passkey.prompts(); ++j) {
      Random random(MixSeed(kPromptSeed, j));
      const std::vector<Secret> secrets =
          DrawSecrets(random, 1 + passkey.distractors(), passkey.digits());
      ASSIGN_OR_RETURN(Asking asking, EncodeAsking(tokenizer, secrets[0]));
      std::vector<Insertion> insertions = {{depth, asking.telling}};
      for (size_t i = 1; i < secrets.size(); ++i) {
        ASSIGN_OR_RETURN(Asking other, EncodeAsking(tokenizer, secrets[i]));
        insertions.push_back({random.UniformDouble(), std::move(other.telling)});
      }
      auto left = context - static_cast<int32_t>(bos_id.has_value() + asking.question.size() +
                                                 asking.answer.size());
      for (const Insertion& insertion : insertions) {
        left -= static_cast<int32_t>(insertion.tokens.size());
      }
      if (left < 1) {
        return absl::InvalidArgumentError(absl::StrCat(
            "quality.context: ", context,
            " tokens hold no filler beside the pass keys; raise it or lower passkey.distractors"));
      }
      if (text_ids.size() < static_cast<size_t>(left)) {
        return absl::InvalidArgumentError(absl::StrCat("quality.text: ", text_ids.size(),
                                                       " tokens, a pass key's filler takes ", left,
                                                       "; take a longer text"));
      }
      const size_t start = random.Uniform(text_ids.size() - static_cast<size_t>(left) + 1);
      PasskeyPrompt prompt{.depth = depth,
                           .answer = std::move(asking.answer),
                           .digit_end = std::move(asking.digit_end),
                           .counted_from = in_prompt ? 1 : 0};
      if (bos_id.has_value()) prompt.tokens.push_back(*bos_id);
      const std::vector<int32_t> woven =
          Weave(text_ids.subspan(start, static_cast<size_t>(left)), std::move(insertions));
      prompt.tokens.insert(prompt.tokens.end(), woven.begin(), woven.end());
      prompt.prefill = static_cast<int32_t>(prompt.tokens.size());
      prompt.tokens.insert(prompt.tokens.end(), asking.question.begin(), asking.question.end());
      if (in_prompt) prompt.prefill = static_cast<int32_t>(prompt.tokens.size());
      prompts.push_back(std::move(prompt));
    }
  }
  return prompts;
}

int32_t CorrectDigits(const PasskeyPrompt& prompt, std::span<const int32_t> answer) {
  KVSWEEP_CHECK_EQ(answer.size(), prompt.answer.size());
  int32_t correct = 0;
  for (size_t digit = static_cast<size_t>(prompt.counted_from); digit < prompt.digit_end.size();
       ++digit) {
    const auto begin = static_cast<size_t>(digit == 0 ? 0 : prompt.digit_end[digit - 1]);
    const auto end = static_cast<size_t>(prompt.digit_end[digit]);
    correct += std::equal(answer.begin() + static_cast<std::ptrdiff_t>(begin),
                          answer.begin() + static_cast<std::ptrdiff_t>(end),
                          prompt.answer.begin() + static_cast<std::ptrdiff_t>(begin));
  }
  return correct;
}

EngineOptions PasskeyReferenceOptions(const ModelConfig& config, int32_t context,
                                      int32_t side_by_side, DType kv_dtype) {
  const QualityTask windows{.windows = side_by_side, .context = context, .prefill = 1};
  EngineOptions options = ReferenceOptions(config, windows, side_by_side, kv_dtype, 0);
  options.max_batched_tokens = std::max(side_by_side, 512);
  options.logits = LogitsMode::kNone;
  options.graphs = true;
  return options;
}

absl::StatusOr<std::vector<std::vector<int32_t>>> AnswerPasskeys(
    InferenceEngine* engine, std::span<const PasskeyPrompt> prompts, const StepObserver& observer) {
  return Answering(engine, prompts, observer).Run();
}

absl::StatusOr<QualityResult::End> RecallPasskeys(InferenceEngine* reference, InferenceEngine* arm,
                                                  std::span<const PasskeyPrompt> prompts,
                                                  int32_t side_by_side,
                                                  const QualityOptions& options,
                                                  std::vector<std::vector<int32_t>>* known,
                                                  const PasskeySink& sink) {
  KVSWEEP_CHECK_GE(side_by_side, 1);
  using End = QualityResult::End;
  const int64_t start_ns = options.clock->NowNs();
  const auto advance = [&](const StepResult& step) {
    if (options.modelled != nullptr) options.modelled->AdvanceNs(step.modelled_ns);
  };
  for (size_t first = 0; first < prompts.size();) {
    if (options.cancel != nullptr && options.cancel->load(std::memory_order_relaxed)) {
      return End::kCancelled;
    }
    if (options.clock->NowNs() - start_ns >= options.time_limit_ns) return End::kTimeLimit;
    const size_t count = std::min(static_cast<size_t>(side_by_side), prompts.size() - first);
    const auto group = prompts.subspan(first, count);
    ASSIGN_OR_RETURN(const auto answers, AnswerPasskeys(arm, group, advance));
    if (known->size() < first + count) {
      KVSWEEP_CHECK(known->size() == first && reference != nullptr);
      ASSIGN_OR_RETURN(auto full, AnswerPasskeys(reference, group, {}));
      known->insert(known->end(), full.begin(), full.end());
    }
    for (size_t i = 0; i < count; ++i) {
      if (!sink(RowOf(first + i, group[i], answers[i], (*known)[first + i]))) {
        return End::kSinkFull;
      }
    }
    first += count;
    if (options.progress) options.progress(first);
  }
  return End::kScoredAll;
}

}  // namespace kvsweep
