# Writes OUTPUT (a .cc file that defines kvsweep::GetBuildInfo) when its content changes.
# Run by every build; takes milliseconds.
#
# runner_digest covers what decides the numbers that a runner measures: the sources of kernels, engine, strategies
# and runner, of the workload and of the random generator, and the flags they are compiled with. Results in the
# store are reused only while it stays the same, so an edit of, say, the command line does not cost a rerun.

set(patterns)
foreach(extension IN ITEMS cc h cu cuh)
  list(APPEND patterns
    ${SOURCE_DIR}/kernels/*.${extension}
    ${SOURCE_DIR}/worker/engine/*.${extension}
    ${SOURCE_DIR}/worker/strategies/*.${extension}
    ${SOURCE_DIR}/worker/telemetry/*.${extension}
    ${SOURCE_DIR}/worker/runner/*.${extension}
    ${SOURCE_DIR}/experiments/workload*.${extension}
    ${SOURCE_DIR}/base/random.${extension})
endforeach()
file(GLOB_RECURSE files RELATIVE ${SOURCE_DIR} ${patterns})
list(SORT files)

set(flags "${FLAGS} cpu_arch=${CPU_ARCH}")
set(manifest "${COMPILER}\n${flags}\n")
foreach(path IN LISTS files)
  file(SHA256 ${SOURCE_DIR}/${path} digest)
  string(APPEND manifest "${digest} ${path}\n")
endforeach()
string(SHA256 runner_digest "${manifest}")

set(commit unknown)
find_program(GIT git)
if(GIT AND EXISTS ${SOURCE_DIR}/.git)
  execute_process(COMMAND ${GIT} describe --always --abbrev=12 --dirty --exclude=*
    WORKING_DIRECTORY ${SOURCE_DIR} OUTPUT_VARIABLE described OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE failed ERROR_QUIET)
  if(NOT failed)
    set(commit "${described}")
  endif()
endif()

file(CONFIGURE OUTPUT ${OUTPUT} @ONLY CONTENT [[
#include "base/version.h"

namespace kvsweep {

const BuildInfo& GetBuildInfo() {
  static const BuildInfo info = {
      .version = "@VERSION@",
      .commit = "@commit@",
      .compiler = "@COMPILER@",
      .flags = "@flags@",
      .runner_digest = "@runner_digest@",
  };
  return info;
}

}  // namespace kvsweep
]])
