#ifndef KVSWEEP_TESTS_BENCH_PREFILLED_H_
#define KVSWEEP_TESTS_BENCH_PREFILLED_H_

#include <memory>

#include "worker/strategies/cache_strategy.h"

// A strategy whose prompts count as computed already, all but their last tokens: decode steps over
// a long cache can be timed without the minutes of prefill that would fill it. Everything is held,
// moved and read as ever; only what the keys and values say is not a prompt's.

namespace kvsweep {

std::unique_ptr<CacheStrategy> AsIfPrefilled(std::unique_ptr<CacheStrategy> strategy);

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_BENCH_PREFILLED_H_
