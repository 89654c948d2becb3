// Quality in a comparison: along the windows, by depth of a pass key, and how sure it is.
#include <cmath>
#include <functional>
#include <map>

#include "experiments/report.h"

namespace kvsweep {
namespace {

// Any fixed number: the interval of a report must not change from one look to the next.
constexpr uint64_t kBootstrapSeed = 1;
constexpr size_t kResamples = 2000;

// A sum over some positions of a window, and how many they are.
struct Share {
  double sum = 0;
  double tokens = 0;
};

// Of sum(sums) / sum(tokens) over windows; none of fewer than two.
std::optional<Interval> BootstrapOf(const std::vector<Share>& shares, double confidence) {
  std::vector<double> sums;
  std::vector<double> tokens;
  for (const Share& share : shares) {
    if (share.tokens <= 0) continue;
    sums.push_back(share.sum);
    tokens.push_back(share.tokens);
  }
  if (sums.size() < 2) return std::nullopt;
  return BootstrapRatio(sums, tokens, kBootstrapSeed, kResamples, confidence);
}

Interval Exp(const Interval& interval) { return {std::exp(interval.low), std::exp(interval.high)}; }

}  // namespace

std::map<std::string, Interval> QualityIntervals(const std::vector<QualityRow>& windows,
                                                 double confidence) {
  std::map<std::string, Interval> intervals;
  const auto add = [&](const char* name, bool perplexity, auto share_of) {
    std::vector<Share> shares;
    for (const QualityRow& row : windows) shares.push_back(share_of(row));
    const std::optional<Interval> interval = BootstrapOf(shares, confidence);
    if (interval) intervals[name] = perplexity ? Exp(*interval) : *interval;
  };
  add("ppl", true, [](const QualityRow& r) {
    return Share{r.nll_sum(), double(r.scored_tokens())};
  });
  add("kl", false, [](const QualityRow& r) {
    return Share{r.kl_sum(), double(r.scored_tokens())};
  });
  add("top1_agreement", false, [](const QualityRow& r) {
    return Share{double(r.top1_matches()), double(r.scored_tokens())};
  });
  add("dropped_ppl", true, [](const QualityRow& r) {
    return Share{r.dropped_nll_sum(), double(r.dropped_tokens())};
  });
  add("dropped_kl", false, [](const QualityRow& r) {
    return Share{r.dropped_kl_sum(), double(r.dropped_tokens())};
  });
  add("dropped_top1_agreement", false, [](const QualityRow& r) {
    return Share{double(r.dropped_top1_matches()), double(r.dropped_tokens())};
  });
  return intervals;
}

std::vector<PositionQuality> QualityByPosition(const std::vector<QualityRow>& windows,
                                               double confidence) {
  std::map<uint32_t, std::vector<const QualityPositions*>> parts;
  for (const QualityRow& window : windows) {
    for (const QualityPositions& part : window.positions()) {
      if (part.scored_tokens() > 0) parts[part.first_position()].push_back(&part);
    }
  }
  std::vector<PositionQuality> qualities;
  for (const auto& [first, rows] : parts) {
    PositionQuality quality{.first_position = first};
    std::vector<Share> divergence;
    double nll = 0;
    double reference_nll = 0;
    double kl = 0;
    double matches = 0;
    for (const QualityPositions* row : rows) {
      quality.scored_tokens += row->scored_tokens();
      nll += row->nll_sum();
      reference_nll += row->reference_nll_sum();
      kl += row->kl_sum();
      matches += row->top1_matches();
      divergence.push_back({row->kl_sum(), double(row->scored_tokens())});
    }
    const auto tokens = static_cast<double>(quality.scored_tokens);
    quality.ppl = std::exp(nll / tokens);
    quality.reference_ppl = std::exp(reference_nll / tokens);
    quality.kl = kl / tokens;
    quality.kl_interval = BootstrapOf(divergence, confidence);
    quality.top1_agreement = matches / tokens;
    qualities.push_back(quality);
  }
  return qualities;
}

std::vector<DepthRecall> RecallByDepth(const std::vector<PasskeyRow>& passkeys, double confidence) {
  std::map<double, DepthRecall> depths;
  for (const PasskeyRow& row : passkeys) {
    DepthRecall& recall = depths[row.depth()];
    recall.depth = row.depth();
    ++recall.prompts;
    recall.recalled += row.recalled();
    recall.reference_recalled += row.reference_recalled();
  }
  std::vector<DepthRecall> recalls;
  for (auto& [depth, recall] : depths) {
    recall.interval = WilsonInterval(recall.recalled, recall.prompts, confidence);
    recall.reference_interval =
        WilsonInterval(recall.reference_recalled, recall.prompts, confidence);
    recalls.push_back(recall);
  }
  return recalls;
}

}  // namespace kvsweep
