#ifndef KVSWEEP_STORAGE_MEMORY_STORE_H_
#define KVSWEEP_STORAGE_MEMORY_STORE_H_

#include <memory>

#include "storage/store.h"

namespace kvsweep {

// The store's rules over plain maps, written as directly as they can be said: what tests compare
// SQLite with, and the store of tests that need no file. Nothing is durable.
std::unique_ptr<Store> NewMemoryStore();

}  // namespace kvsweep

#endif  // KVSWEEP_STORAGE_MEMORY_STORE_H_
