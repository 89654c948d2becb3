# Settings of the whole build. Presets (CMakePresets.json) choose among them.

option(KVSWEEP_WERROR "Treat compiler warnings as errors" OFF)
option(KVSWEEP_TESTS "Build the tests" ON)

# Flags for the targets whose inner loops must vectorise (kvsweep_library(... CPU_ARCH)). All other code
# stays at the compiler's default, so that programs start, and say what is missing, on any machine.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(kvsweep_default_cpu_arch "x86-64-v3")
else()
  set(kvsweep_default_cpu_arch "")
endif()
set(KVSWEEP_CPU_ARCH "${kvsweep_default_cpu_arch}" CACHE STRING
    "Value of -march for the CPU kernels; empty: the compiler's default")

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
# Everywhere, since precompiled headers are shared among targets with and without threads.
add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-pthread>)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()

set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/bin)
set(CMAKE_ARCHIVE_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/lib)

string(TOUPPER ${CMAKE_BUILD_TYPE} kvsweep_build_type)

# Speeds up repeated builds where it is installed; nothing depends on it.
find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM AND NOT DEFINED CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
endif()
option(KVSWEEP_PRECOMPILED_HEADERS "Compile common headers once for all sources" ON)
option(KVSWEEP_PLANTED_BUGS "Compile in the mistakes of base/planted_bug.h, to be switched on at run time" OFF)
if(KVSWEEP_PLANTED_BUGS)
  add_compile_definitions(KVSWEEP_PLANTED_BUGS)
endif()
