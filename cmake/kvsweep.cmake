# How a target of this project is made. Each folder's CMakeLists.txt uses these functions and nothing else:
#
#   kvsweep_library(NAME SOURCES a.cc b.cc [HEADERS c.h] [DEPS …] [PRIVATE_DEPS …] [CPU_ARCH])
#   kvsweep_program(NAME SOURCES x_main.cc [DEPS …])
#   kvsweep_proto_library(NAME PROTOS a.proto … [DEPS …] [GRPC])
#   kvsweep_test(x_test.cc [SOURCES …] [DEPS …] [LABELS fast|slow|faults|gpu|asan …] [TIMEOUT seconds] [PROGRAMS …])
#
# Headers are included from the root of the tree ("base/clock.h"), generated ones likewise ("proto/experiment.pb.h").

set(kvsweep_generated_dir ${PROJECT_BINARY_DIR}/generated)
file(MAKE_DIRECTORY ${kvsweep_generated_dir})

# Compiles every header of every library alone. Not part of `all`: `ninja header_self_test`.
add_custom_target(header_self_test)

# Warnings, include folders and language settings that all our own code shares.
function(kvsweep_configure_target target)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR})
  target_include_directories(${target} SYSTEM PRIVATE ${kvsweep_generated_dir})
  # -Wrestrict is off: g++ 12 sees overlap in plain assignments to std::string (GCC bug 105651).
  # -Wmissing-field-initializers is off: options structs are initialised by the fields that differ from the default.
  # -Wunused-parameter is off: hooks and overrides keep the names of what they do not need; the names document.
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wno-restrict -Wno-missing-field-initializers -Wno-unused-parameter
                         $<$<BOOL:${KVSWEEP_WERROR}>:-Werror>)
endfunction()

# kvsweep_library: sources without any .cc make an interface library (headers only).
# A header x.h beside a listed x.cc belongs to the library by itself; HEADERS names the others.
# CPU_ARCH: compile for KVSWEEP_CPU_ARCH instead of the compiler's default.
function(kvsweep_library name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "CPU_ARCH" "" "SOURCES;HEADERS;DEPS;PRIVATE_DEPS")
  kvsweep_reject_unparsed(${name} "${arg_UNPARSED_ARGUMENTS}")
  if(arg_SOURCES)
    add_library(${name} STATIC ${arg_SOURCES})
    kvsweep_configure_target(${name})
    target_link_libraries(${name} PUBLIC ${arg_DEPS} PRIVATE ${arg_PRIVATE_DEPS})
    if(arg_CPU_ARCH AND KVSWEEP_CPU_ARCH)
      target_compile_options(${name} PRIVATE -march=${KVSWEEP_CPU_ARCH})
    endif()
  else()
    add_library(${name} INTERFACE)
    target_link_libraries(${name} INTERFACE ${arg_DEPS})
  endif()

  if(arg_SOURCES AND NOT arg_CPU_ARCH)
    kvsweep_register_precompiled(${name} library)
  endif()

  set(headers ${arg_HEADERS})
  foreach(source IN LISTS arg_SOURCES)
    string(REGEX REPLACE "\\.cc$" ".h" header ${source})
    if(EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/${header})
      list(APPEND headers ${header})
    endif()
  endforeach()
  list(REMOVE_DUPLICATES headers)
  kvsweep_header_test(${name} "${headers}")
endfunction()

# One empty source per header, so that a header that leans on what another included fails by name.
function(kvsweep_header_test name headers)
  if(NOT headers)
    return()
  endif()
  set(sources)
  foreach(header IN LISTS headers)
    file(RELATIVE_PATH path ${PROJECT_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/${header})
    set(source ${PROJECT_BINARY_DIR}/header_self_test/${path}.cc)
    file(CONFIGURE OUTPUT ${source} CONTENT "#include \"${path}\"\n" @ONLY)
    list(APPEND sources ${source})
  endforeach()
  add_library(${name}_headers OBJECT EXCLUDE_FROM_ALL ${sources})
  kvsweep_configure_target(${name}_headers)
  target_compile_options(${name}_headers PRIVATE -O0 -g0)
  target_link_libraries(${name}_headers PRIVATE ${name})
  add_dependencies(header_self_test ${name}_headers)
endfunction()

function(kvsweep_program name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "SOURCES;DEPS")
  kvsweep_reject_unparsed(${name} "${arg_UNPARSED_ARGUMENTS}")
  add_executable(${name} ${arg_SOURCES})
  kvsweep_configure_target(${name})
  target_link_libraries(${name} PRIVATE ${arg_DEPS})
  # Programs find libraries that were packed beside them (scripts/bundle), and so do those libraries: hence the old tag.
  set_target_properties(${name} PROPERTIES BUILD_RPATH "$ORIGIN/../lib" INSTALL_RPATH "$ORIGIN/../lib")
  target_link_options(${name} PRIVATE LINKER:--disable-new-dtags)
  install(TARGETS ${name} RUNTIME DESTINATION bin)
  set_property(GLOBAL APPEND PROPERTY KVSWEEP_PROGRAMS ${name})
endfunction()

# Generates C++ from .proto files; imports are written from the root of the tree ("proto/experiment.proto").
# DEPS names the proto libraries that the files import. GRPC also generates services.
function(kvsweep_proto_library name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "GRPC" "" "PROTOS;DEPS")
  kvsweep_reject_unparsed(${name} "${arg_UNPARSED_ARGUMENTS}")
  set(sources)
  foreach(proto IN LISTS arg_PROTOS)
    cmake_path(ABSOLUTE_PATH proto BASE_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR})
    file(RELATIVE_PATH path ${PROJECT_SOURCE_DIR} ${proto})
    string(REGEX REPLACE "\\.proto$" "" stem ${path})
    set(outputs ${kvsweep_generated_dir}/${stem}.pb.cc ${kvsweep_generated_dir}/${stem}.pb.h)
    set(plugin)
    if(arg_GRPC)
      list(APPEND outputs ${kvsweep_generated_dir}/${stem}.grpc.pb.cc ${kvsweep_generated_dir}/${stem}.grpc.pb.h)
      set(plugin --grpc_out=${kvsweep_generated_dir} --plugin=protoc-gen-grpc=$<TARGET_FILE:gRPC::grpc_cpp_plugin>)
    endif()
    add_custom_command(
      OUTPUT ${outputs}
      COMMAND protobuf::protoc -I ${PROJECT_SOURCE_DIR} --cpp_out=${kvsweep_generated_dir} ${plugin} ${path}
      DEPENDS ${proto} WORKING_DIRECTORY ${PROJECT_SOURCE_DIR} VERBATIM COMMENT "Generating C++ from ${path}")
    list(APPEND sources ${outputs})
  endforeach()
  add_library(${name} STATIC ${sources})
  target_include_directories(${name} SYSTEM PUBLIC ${kvsweep_generated_dir})
  target_compile_options(${name} PRIVATE -w)  # generated code answers to its generator
  target_link_libraries(${name} PUBLIC protobuf::libprotobuf ${arg_DEPS})
  if(arg_GRPC)
    target_link_libraries(${name} PUBLIC gRPC::grpc++)
  endif()
endfunction()

# One executable per test file, named after its path below tests/ ("base/clock_test"). It runs in the root of the
# tree, so tests open experiments/… by relative path. KVSWEEP_BIN_DIR is the folder of the programs; PROGRAMS names
# those that the test starts. Label asan: part of the sanitizer pass of scripts/test, in addition to fast or slow.
# `ninja tests_fast` builds what `ctest -L fast` runs, and so on for each label.
function(kvsweep_test source)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "TIMEOUT" "SOURCES;DEPS;LABELS;PROGRAMS")
  kvsweep_reject_unparsed(${source} "${arg_UNPARSED_ARGUMENTS}")
  file(RELATIVE_PATH path ${PROJECT_SOURCE_DIR}/tests ${CMAKE_CURRENT_SOURCE_DIR}/${source})
  string(REGEX REPLACE "\\.cc$" "" test ${path})
  string(REPLACE "/" "_" target ${test})
  if(NOT arg_LABELS)
    set(arg_LABELS fast)
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 120)
  endif()

  add_executable(${target} ${source} ${arg_SOURCES})
  kvsweep_configure_target(${target})
  # g++ 12 at -O1 sees std::string's own buffer overrun where a long literal is assigned to it (GCC bug 105329).
  target_compile_options(${target} PRIVATE -Wno-array-bounds -Wno-stringop-overflow)
  target_compile_definitions(${target} PRIVATE KVSWEEP_BIN_DIR="${CMAKE_RUNTIME_OUTPUT_DIRECTORY}")
  target_link_libraries(${target} PRIVATE ${arg_DEPS} test_main)
  kvsweep_register_precompiled(${target} test)
  set_target_properties(${target} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/tests)
  if(arg_PROGRAMS)
    add_dependencies(${target} ${arg_PROGRAMS})
  endif()

  add_test(NAME ${test} COMMAND ${target} WORKING_DIRECTORY ${PROJECT_SOURCE_DIR})
  set_tests_properties(${test} PROPERTIES LABELS "${arg_LABELS}" TIMEOUT ${arg_TIMEOUT})
  foreach(label IN LISTS arg_LABELS)
    if(NOT TARGET tests_${label})
      add_custom_target(tests_${label})
    endif()
    add_dependencies(tests_${label} ${target})
  endforeach()
endfunction()

# A misspelt keyword would otherwise be dropped in silence.
function(kvsweep_reject_unparsed name unparsed)
  if(unparsed)
    message(FATAL_ERROR "${name}: unknown arguments: ${unparsed}")
  endif()
endfunction()

# Every source that some target of `directory` or below is built from, as absolute paths in the list `result`.
function(kvsweep_collect_sources directory result)
  set(collected)
  get_property(targets DIRECTORY ${directory} PROPERTY BUILDSYSTEM_TARGETS)
  foreach(target IN LISTS targets)
    get_target_property(sources ${target} SOURCES)
    get_target_property(folder ${target} SOURCE_DIR)
    foreach(source IN LISTS sources)
      cmake_path(ABSOLUTE_PATH source BASE_DIRECTORY ${folder})
      list(APPEND collected ${source})
    endforeach()
  endforeach()
  get_property(subdirectories DIRECTORY ${directory} PROPERTY SUBDIRECTORIES)
  foreach(subdirectory IN LISTS subdirectories)
    kvsweep_collect_sources(${subdirectory} below)
    list(APPEND collected ${below})
  endforeach()
  set(${result} ${collected} PARENT_SCOPE)
endfunction()

# ---- precompiled headers
# More than half of the compile time of a cold build is the parsing of the same few headers. Each target takes the
# richest of four precompiled sets that it may see: for a library or a test, with or without the schema's messages.
# What a file needs it still includes: header_self_test builds without them, and KVSWEEP_PRECOMPILED_HEADERS=OFF the rest.

function(kvsweep_register_precompiled target kind)
  set_property(GLOBAL APPEND PROPERTY KVSWEEP_PRECOMPILED_${kind} ${target})
endfunction()

# Whether `target` links the schema's messages, directly or through our own libraries.
function(kvsweep_links_schema target result)
  get_property(known GLOBAL PROPERTY KVSWEEP_LINKS_SCHEMA_${target})
  if(NOT DEFINED known OR known STREQUAL "")
    set(known OFF)
    get_target_property(libraries ${target} LINK_LIBRARIES)
    foreach(library IN LISTS libraries)
      if(library STREQUAL kvsweep_experiment_proto)
        set(known ON)
      elseif(TARGET ${library})
        get_target_property(imported ${library} IMPORTED)
        get_target_property(type ${library} TYPE)
        if(NOT imported AND NOT "${type}" STREQUAL INTERFACE_LIBRARY)
          kvsweep_links_schema(${library} known)
        endif()
      endif()
      if(known)
        break()
      endif()
    endforeach()
    set_property(GLOBAL PROPERTY KVSWEEP_LINKS_SCHEMA_${target} ${known})
  endif()
  set(${result} ${known} PARENT_SCOPE)
endfunction()

# Called once, when all targets are known.
function(kvsweep_precompile_headers)
  set(plain <algorithm> <functional> <map> <memory> <optional> <set> <span> <string> <utility> <vector>
      <absl/status/status.h> <absl/status/statusor.h> <absl/strings/str_cat.h> <absl/strings/string_view.h>)
  set(schema <proto/experiment.pb.h>)
  set(gtest <sstream> <gtest/gtest.h> <gmock/gmock.h>)
  foreach(kind IN ITEMS library test)
    get_property(targets GLOBAL PROPERTY KVSWEEP_PRECOMPILED_${kind})
    foreach(target IN LISTS targets)
      kvsweep_links_schema(${target} links_schema)
      set(set precompiled_${kind})
      set(headers ${plain})
      if(links_schema)
        string(APPEND set _schema)
        list(APPEND headers ${schema})
      endif()
      if(kind STREQUAL test)
        list(APPEND headers ${gtest})
      endif()
      if(NOT TARGET ${set})
        file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/${set}.cc CONTENT "")
        add_library(${set} OBJECT ${PROJECT_BINARY_DIR}/${set}.cc)
        kvsweep_configure_target(${set})
        target_precompile_headers(${set} PRIVATE ${headers})
        if(links_schema)
          target_link_libraries(${set} PRIVATE kvsweep_experiment_proto)
        endif()
        if(kind STREQUAL test)
          target_link_libraries(${set} PRIVATE GTest::gtest GTest::gmock)
          # A program's code is position independent in another way than a library's, and the two must agree.
          set_target_properties(${set} PROPERTIES POSITION_INDEPENDENT_CODE OFF)
          target_compile_options(${set} PRIVATE -fPIE)
        endif()
      endif()
      target_precompile_headers(${target} REUSE_FROM ${set})
    endforeach()
  endforeach()
endfunction()
