# Run at every build: writes OUT with the commit of SOURCE and whether its tree has changes; the file
# is only touched when that changed, so nothing is compiled again for nothing.
find_package(Git QUIET)
set(commit "unknown")
set(dirty 0)
if(GIT_FOUND)
    execute_process(COMMAND "${GIT_EXECUTABLE}" -C "${SOURCE}" rev-parse HEAD
        OUTPUT_VARIABLE head OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
    if(NOT failed)
        set(commit "${head}")
        execute_process(COMMAND "${GIT_EXECUTABLE}" -C "${SOURCE}" status --porcelain
            OUTPUT_VARIABLE changes ERROR_QUIET)
        if(NOT "${changes}" STREQUAL "")
            set(dirty 1)
        endif()
    endif()
endif()
file(WRITE "${OUT}.new" "#define SHOAL_COMMIT \"${commit}\"\n#define SHOAL_DIRTY  ${dirty}\n")
execute_process(COMMAND "${CMAKE_COMMAND}" -E copy_if_different "${OUT}.new" "${OUT}")
