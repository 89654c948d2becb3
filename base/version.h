#ifndef KVSWEEP_BASE_VERSION_H_
#define KVSWEEP_BASE_VERSION_H_

namespace kvsweep {

// What this program was built from. Written by cmake/build_info.cmake at build time; link
// `base_version`.
struct BuildInfo {
  const char* version;  // "0.1.0"
  const char*
      commit;  // abbreviated git commit, with "-dirty" after local edits; "unknown" outside a clone
  const char* compiler;  // "GNU 12.2.0"
  const char* flags;  // compiler flags of this build type, and the CPU architecture of the kernels

  // SHA-256 (hex) over the sources that decide what a runner measures, the compiler and its flags.
  // Part of the content key of every trial.
  const char* runner_digest;
};

// The same object on every call. Thread-safe.
const BuildInfo& GetBuildInfo();

}  // namespace kvsweep

#endif  // KVSWEEP_BASE_VERSION_H_
