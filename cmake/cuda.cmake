# The CUDA backend is built where a compiler for it is found: no driver and no device are needed for that.
#
#   KVSWEEP_CUDA                AUTO (if nvcc is found), ON (or fail), OFF
#   CMAKE_CUDA_ARCHITECTURES    one architecture for development; the preset `cuda` names all that are shipped

set(KVSWEEP_CUDA AUTO CACHE STRING "Build the CUDA backend: AUTO (if nvcc is found), ON, OFF")
set_property(CACHE KVSWEEP_CUDA PROPERTY STRINGS AUTO ON OFF)

set(kvsweep_cuda OFF)
if(NOT KVSWEEP_CUDA STREQUAL OFF)
  find_program(KVSWEEP_NVCC nvcc HINTS /usr/local/cuda/bin ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
  if(KVSWEEP_NVCC)
    set(kvsweep_cuda ON)
  elseif(KVSWEEP_CUDA STREQUAL ON)
    message(FATAL_ERROR "KVSWEEP_CUDA is ON, but nvcc was not found; put it on PATH or set CUDA_HOME")
  endif()
endif()

if(kvsweep_cuda)
  set(CMAKE_CUDA_COMPILER ${KVSWEEP_NVCC} CACHE FILEPATH "CUDA compiler")
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 90a CACHE STRING "Architectures of the CUDA kernels")
  endif()
  if(CCACHE_PROGRAM AND NOT DEFINED CMAKE_CUDA_COMPILER_LAUNCHER)
    set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
  endif()
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know that this compiler has C++20
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  # Kernels are optimised in every preset.
  foreach(type IN ITEMS DEBUG RELEASE)
    set(CMAKE_CUDA_FLAGS_${type} "-O3 -lineinfo")
  endforeach()
  find_package(CUDAToolkit REQUIRED)
endif()
message(STATUS "CUDA backend: ${kvsweep_cuda} (KVSWEEP_CUDA=${KVSWEEP_CUDA})")

# A library of device code: sources x.cu, compiled with warnings on the host's side.
function(kvsweep_cuda_library name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "SOURCES;DEPS;PRIVATE_DEPS")
  kvsweep_reject_unparsed(${name} "${arg_UNPARSED_ARGUMENTS}")
  add_library(${name} STATIC ${arg_SOURCES})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_compile_options(${name} PRIVATE
    --expt-relaxed-constexpr -Xcompiler=-Wall,-Wno-unused-parameter $<$<BOOL:${KVSWEEP_WERROR}>:-Werror=all-warnings>)
  target_link_libraries(${name} PUBLIC ${arg_DEPS} PRIVATE CUDA::cudart_static ${arg_PRIVATE_DEPS})
endfunction()
