# Every library from outside, found once. scripts/packages.txt lists the Debian packages that hold them.
# Targets to name in DEPS:
#   absl::…  OpenSSL::Crypto  spdlog::spdlog  Threads::Threads           (what base brings along)
#   protobuf::libprotobuf  gRPC::grpc++  gRPC::grpc++_reflection          (the wires)
#   yaml-cpp  nlohmann_json::nlohmann_json  CLI11::CLI11                  (specs, model configs, flags)
#   SQLite::SQLite3  PkgConfig::zstd                                      (the store)
#   PkgConfig::pcre2  PkgConfig::utf8proc                                 (byte-level tokenizers)
#   OpenBLAS::OpenBLAS  Eigen3::Eigen  Boost::headers                     (products, SVD, quantiles)
#   GTest::gtest  GTest::gmock                                            (tests)

find_package(Threads REQUIRED)
find_package(PkgConfig REQUIRED)
find_package(absl REQUIRED CONFIG)
find_package(OpenSSL REQUIRED)
find_package(spdlog REQUIRED CONFIG)

# Debian ships no config package for Protocol Buffers: CMake's own module finds it, and must come before gRPC.
find_package(Protobuf 3.21 REQUIRED MODULE)
find_package(gRPC REQUIRED CONFIG)

find_package(yaml-cpp REQUIRED CONFIG)
find_package(nlohmann_json REQUIRED CONFIG)
find_package(CLI11 REQUIRED CONFIG)
find_package(SQLite3 REQUIRED)
pkg_check_modules(zstd REQUIRED IMPORTED_TARGET libzstd)
pkg_check_modules(pcre2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(utf8proc REQUIRED IMPORTED_TARGET libutf8proc)

find_package(Eigen3 REQUIRED CONFIG)
find_package(Boost REQUIRED)

# The pkg-config file names the include folder of the chosen variant; the CMake config of Debian names none.
pkg_check_modules(openblas REQUIRED IMPORTED_TARGET openblas)
add_library(OpenBLAS::OpenBLAS INTERFACE IMPORTED)
target_link_libraries(OpenBLAS::OpenBLAS INTERFACE PkgConfig::openblas)

if(KVSWEEP_TESTS)
  find_package(GTest REQUIRED)
endif()
