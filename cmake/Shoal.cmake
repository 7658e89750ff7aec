# What every target of this project shares: language level, warnings, and two helper functions.

if(NOT CMAKE_BUILD_TYPE)
    set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_C_STANDARD 17)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_C_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
# Assertions guard our own bugs and stay on in release builds (no NDEBUG).
set(CMAKE_C_FLAGS_RELEASE "-O3 -g1")

set(SHOAL_SANITIZE "" CACHE STRING "Sanitizers to build with: 'address,undefined' or 'thread'")
option(SHOAL_FUZZ "Build the libFuzzer targets (clang)" OFF)

find_package(Threads REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(JANSSON REQUIRED IMPORTED_TARGET jansson)
pkg_check_modules(YAML REQUIRED IMPORTED_TARGET yaml-0.1)
pkg_check_modules(SODIUM REQUIRED IMPORTED_TARGET libsodium)
pkg_check_modules(LMDB REQUIRED IMPORTED_TARGET lmdb)
pkg_check_modules(OPENBLAS REQUIRED IMPORTED_TARGET openblas)
pkg_search_module(MSGPACK REQUIRED IMPORTED_TARGET msgpack-c msgpack)
pkg_check_modules(ZMQ REQUIRED IMPORTED_TARGET libzmq)
pkg_check_modules(MICROHTTPD REQUIRED IMPORTED_TARGET libmicrohttpd)
pkg_check_modules(CMOCKA REQUIRED IMPORTED_TARGET cmocka)

add_library(shoal_options INTERFACE)
target_include_directories(shoal_options INTERFACE "${CMAKE_SOURCE_DIR}")
target_compile_definitions(shoal_options INTERFACE _GNU_SOURCE)
target_compile_options(shoal_options INTERFACE
    -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wpointer-arith
    -Wwrite-strings -Wformat=2 -Wundef -Wvla -Werror
    -fno-math-errno -fno-common)
if(CMAKE_C_COMPILER_ID STREQUAL "GNU" AND CMAKE_C_COMPILER_VERSION VERSION_LESS 13
   AND CMAKE_SYSTEM_PROCESSOR STREQUAL "aarch64")
    # gcc 12 stops with an internal error on fmax and fmin of widened floats in a loop.
    target_compile_options(shoal_options INTERFACE -fno-builtin-fmax -fno-builtin-fmin)
endif()
if(SHOAL_SANITIZE)
    target_compile_options(shoal_options INTERFACE
        -fsanitize=${SHOAL_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
    target_link_options(shoal_options INTERFACE -fsanitize=${SHOAL_SANITIZE})
endif()

if(SHOAL_FUZZ) # coverage of the libraries is what guides the fuzzer
    target_compile_options(shoal_options INTERFACE -fsanitize=fuzzer-no-link)
endif()

# shoal_module(NAME SOURCES a.c ... DEPENDS shoal_x ... PRIVATE PkgConfig::Y ...)
# A static library shoal_NAME. DEPENDS are modules whose headers its own headers include.
function(shoal_module NAME)
    cmake_parse_arguments(M "" "" "SOURCES;DEPENDS;PRIVATE" ${ARGN})
    add_library(shoal_${NAME} STATIC ${M_SOURCES})
    target_link_libraries(shoal_${NAME} PUBLIC shoal_options ${M_DEPENDS} PRIVATE ${M_PRIVATE})
endfunction()

# shoal_program(NAME SOURCES a.c ... LIBS shoal_x ...): an executable in the build's bin/ folder.
function(shoal_program NAME)
    cmake_parse_arguments(P "" "" "SOURCES;LIBS" ${ARGN})
    add_executable(${NAME} ${P_SOURCES})
    target_link_libraries(${NAME} PRIVATE shoal_options ${P_LIBS})
    set_target_properties(${NAME} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/bin")
endfunction()

# The longest that a test may take; under qemu everything takes much longer.
set(SHOAL_TEST_SECONDS 900)
if(CMAKE_CROSSCOMPILING)
    set(SHOAL_TEST_SECONDS 3600)
endif()

# shoal_test(NAME SOURCES a.c ... LIBS shoal_x ... [LABELS quick|long|spawns ...] [ARGS ...])
# A cmocka test. Exit status 77 is a skip, which must say why. spawns: it starts our programs, or
# itself, which qemu-user cannot (check --arch).
function(shoal_test NAME)
    cmake_parse_arguments(T "" "" "SOURCES;LIBS;LABELS;ARGS" ${ARGN})
    add_executable(test_${NAME} ${T_SOURCES})
    target_link_libraries(test_${NAME} PRIVATE shoal_options ${T_LIBS} PkgConfig::CMOCKA)
    target_compile_definitions(test_${NAME} PRIVATE SHOAL_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
    add_test(NAME ${NAME} COMMAND test_${NAME} ${T_ARGS})
    set_tests_properties(${NAME} PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT ${SHOAL_TEST_SECONDS} LABELS "${T_LABELS}")
endfunction()

# shoal_fuzz(NAME SOURCE f.c LIBS ... CORPUS dir): with SHOAL_FUZZ a libFuzzer program; always a
# test that replays every file of the corpus through the same entry point.
function(shoal_fuzz NAME)
    cmake_parse_arguments(F "" "SOURCE;CORPUS" "LIBS" ${ARGN})
    if(SHOAL_FUZZ)
        add_executable(fuzz_${NAME} ${F_SOURCE})
        target_link_libraries(fuzz_${NAME} PRIVATE shoal_options ${F_LIBS})
        target_link_options(fuzz_${NAME} PRIVATE -fsanitize=fuzzer)
    endif()
    add_executable(replay_${NAME} ${F_SOURCE} "${CMAKE_SOURCE_DIR}/tests/fuzz/replay_main.c")
    target_link_libraries(replay_${NAME} PRIVATE shoal_options ${F_LIBS})
    add_test(NAME fuzz_replay_${NAME} COMMAND replay_${NAME} ${F_CORPUS})
    set_tests_properties(fuzz_replay_${NAME} PROPERTIES SKIP_RETURN_CODE 77 LABELS quick)
endfunction()

# shoal_unit(FILE): a systemd unit, installed with the path that the programs are installed to.
function(shoal_unit FILE)
    file(READ "${FILE}" unit)
    string(REPLACE "/usr/local/bin/" "${CMAKE_INSTALL_PREFIX}/bin/" unit "${unit}")
    file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/${FILE}" "${unit}")
    install(FILES "${CMAKE_CURRENT_BINARY_DIR}/${FILE}" DESTINATION lib/systemd/system)
endfunction()
