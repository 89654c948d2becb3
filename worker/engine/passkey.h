// Recall of a number hidden in a text: what an arm that drops or skips entries loses first.
//
// A prompt is a stretch of filler text with a sentence that tells someone's pass key at a given
// depth, and perhaps others' beside it (distractors). Then the key is asked for, and the answer is
// decoded greedily. Question after_prefill: the strategy prunes at the end of the filler; question
// and answer are fed and produced token by token over what it kept. Question in_prompt: the
// question ends the prompt, so its queries take part in what is kept; the first digit then comes
// out of the prefill, where every arm still has everything, and does not count.
//
// The sentences are those that the books models were trained on, token for token. Prompts depend on
// the text and the questions alone: every arm answers the same ones, and the j-th prompt of every
// depth has the same filler and number.
//
// One thread.
#ifndef KVSWEEP_WORKER_ENGINE_PASSKEY_H_
#define KVSWEEP_WORKER_ENGINE_PASSKEY_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/experiment.pb.h"
#include "worker/engine/engine.h"
#include "worker/engine/manual_steps.h"
#include "worker/engine/quality.h"
#include "worker/engine/tokenizer.h"

namespace kvsweep {

struct PasskeyPrompt {
  double depth = 0;
  std::vector<int32_t> tokens;  // BOS, filler, keys and question
  int32_t prefill = 0;          // of them, the prompt; the rest is fed one by one
  std::vector<int32_t> answer;  // what follows if all is recalled
  // Tokens of `answer` that each digit ends at: digit k is answer[end(k - 1), end(k)).
  std::vector<int32_t> digit_end;
  int32_t counted_from = 0;  // first digit that counts

  // Tokens in all, those of the answer included.
  int32_t context() const { return static_cast<int32_t>(tokens.size() + answer.size()); }
  RequestShape shape() const { return {prefill, context() - prefill, context()}; }
};

// The prompts of each depth, depths in their order; each has `context` tokens in all. The filler
// comes from `text_ids`, from places drawn at random. InvalidArgument when the text or the context
// is too short, or when the tokenizer cannot keep the sentences apart.
absl::StatusOr<std::vector<PasskeyPrompt>> MakePasskeyPrompts(const Passkey& passkey,
                                                              const Tokenizer& tokenizer,
                                                              std::span<const int32_t> text_ids,
                                                              std::optional<int32_t> bos_id,
                                                              int32_t context);

// Digits of the prompt that count and are right in place, in an answer as produced.
int32_t CorrectDigits(const PasskeyPrompt& prompt, std::span<const int32_t> answer);

// Engine options of the full cache that answers beside the arm.
EngineOptions PasskeyReferenceOptions(const ModelConfig& config, int32_t context,
                                      int32_t side_by_side, DType kv_dtype);

// The tokens that `engine` gives for each prompt, `prompts` side by side. REQUIRES: the engine is
// idle and has room for all of them.
absl::StatusOr<std::vector<std::vector<int32_t>>> AnswerPasskeys(
    InferenceEngine* engine, std::span<const PasskeyPrompt> prompts, const StepObserver& observer);

// Takes a prompt's row; false: no room, which ends the asking.
using PasskeySink = std::function<bool(PasskeyRow row)>;

// Asks all prompts of `arm` and of the full cache, `side_by_side` at a time: a PasskeyRow for each,
// in order. The full cache's answers are taken from `*known` where it has them (they belong to the
// same prompts), else computed by `reference` and left there. `options.progress` counts prompts.
absl::StatusOr<QualityResult::End> RecallPasskeys(InferenceEngine* reference, InferenceEngine* arm,
                                                  std::span<const PasskeyPrompt> prompts,
                                                  int32_t side_by_side,
                                                  const QualityOptions& options,
                                                  std::vector<std::vector<int32_t>>* known,
                                                  const PasskeySink& sink);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_PASSKEY_H_
