# The rules of lint.sh that look at one source file at a time. Input: C files, named from the root.
# Output: "path:line: rule: what is wrong". Plain POSIX awk: no intervals, no gawk functions.

BEGIN {
    # module -> the modules whose headers it may include, itself among them
    uses["base"] = " base "
    uses["math"] = " base math "
    uses["model"] = " base math model "
    uses["stats"] = " base stats "
    uses["store"] = " base store "
    uses["wire"] = " base wire "
    uses["net"] = " base net "
    uses["http"] = " base http "
    uses["sync"] = " base store wire sync "
    every = " base math model stats store wire net http sync trainer "
    uses["trainer"] = " base math model trainer "
    uses["edge-node"] = every "edge-node "
    uses["aggregator"] = every "aggregator "
    uses["experiments"] = every "edge-node aggregator experiments "

    # header of a library -> the only place that may include it
    home["msgpack"] = "^shared/wire/"
    home["lmdb\\.h"] = "^shared/store/"
    home["zmq"] = "^(shared/net|experiments/bench-ingest)/" # the second is its peer
    home["(openblas/)?(cblas|lapacke|openblas_config)"] = "^shared/math/"
    home["sodium"] = "^shared/base/hash\\.c$"
    home["microhttpd"] = "^shared/http/"
    home["yaml\\.h"] = "^shared/base/option_yaml\\.c$"
    home["jansson"] = "^shared/base/json\\.h$"

    before = "(^|[^A-Za-z0-9_.>])" # a call of a function, not of a member
    banned = "(strcpy|strcat|sprintf|vsprintf|gets|alloca)"
    banned_library = "(system|popen|exit|_exit|printf|vprintf|puts|putchar)"
    # What would reach around the shell of a core: files, clocks, sockets, threads, chance.
    io_header = "^(time\\.h|sys/|unistd\\.h|pthread\\.h|fcntl\\.h|threads\\.h|poll\\.h|signal\\.h|" \
                "spawn\\.h|dirent\\.h|netinet/|arpa/|netdb\\.h)"
    io_call = "(fopen|freopen|fdopen|fread|fwrite|fputs|fputc|fgets|fprintf|vfprintf|printf|puts|" \
              "putchar|getchar|scanf|fscanf|remove|rename|tmpfile|open|openat|read|write|pread|" \
              "pwrite|mmap|socket|time|clock|clock_gettime|gettimeofday|nanosleep|usleep|sleep|" \
              "rand|srand|random|srandom|rand_r|drand48|getrandom|getenv|setenv|fork|system|" \
              "popen|abort|exit|sh_file_[a-z_]+|sh_map_open|sh_dir_make|sh_json_load|sh_json_save)"
    columns_max = 100
    file_lines_max = 1100
    function_lines_max = 100
}

function say(rule, text) {
    printf "%s:%d: %s: %s\n", FILENAME, FNR, rule, text
    found = 1
}

function module_of(path,    parts) {
    split(path, parts, "/")
    return parts[1] == "shared" ? parts[2] : parts[1]
}

# The line without comments, and with its strings and characters emptied.
function code_of(line,    out, first, mark) {
    out = ""
    while (line != "") {
        if (in_comment) {
            first = index(line, "*/")
            if (!first)
                return out
            line = substr(line, first + 2)
            in_comment = 0
            continue
        }
        if (!match(line, /["']|\/\*|\/\//))
            return out line
        out = out substr(line, 1, RSTART - 1)
        mark = substr(line, RSTART, 2)
        line = substr(line, RSTART)
        if (mark == "//")
            return out
        if (mark == "/*") {
            in_comment = 1
            line = substr(line, 3)
            continue
        }
        mark = substr(mark, 1, 1)
        # The string: escaped characters or others, up to its quote.
        if (mark == "\"")
            match(line, /^"([^"\\]|\\.)*"?/)
        else
            match(line, /^'([^'\\]|\\.)*'?/)
        out = out mark mark
        line = substr(line, RLENGTH + 1)
    }
    return out
}

function check_include(line,    name, quoted, other, header) {
    name = line
    sub(/^[ \t]*#[ \t]*include[ \t]*/, "", name)
    quoted = substr(name, 1, 1) == "\""
    sub(/^["<]/, "", name)
    sub(/[">].*$/, "", name)
    if (quoted) {
        other = module_of(name)
        if (!(other in uses) && other != "tests")
            say("include-path", "\"" name "\" is not a path from the root of the project")
        else if (module != "tests" && index(uses[module], " " other " ") == 0)
            say("layers", module " may not use " other ": \"" name "\"")
        if (name ~ /_internal\.h$/ && other != module && module != "tests")
            say("internal", "\"" name "\" belongs to " other)
    }
    if (module != "tests")
        for (header in home)
            if (name ~ "^" header && FILENAME !~ home[header])
                say("library-home", "<" name "> may not be included here")
    if (is_core && name ~ io_header)
        say("core-io", "a core does no I/O: <" name ">")
    if (is_core && name == "shared/base/file.h")
        say("core-io", "a core does no I/O: \"" name "\"")
}

FNR == 1 {
    in_comment = 0
    function_start = 0
    module = module_of(FILENAME)
    is_library = FILENAME ~ /^(shared|trainer)\// && FILENAME !~ /_main\.[ch]$/ && \
                 FILENAME !~ /^shared\/base\/(status|log)\.c$/
    is_core = FILENAME ~ /^edge-node\/node[a-z0-9_]*\.[ch]$/ || \
              FILENAME ~ /^aggregator\/coordinator[a-z0-9_]*\.[ch]$/ || FILENAME ~ /^shared\/sync\//
    if (!(module in uses) && module != "tests")
        say("include-path", "the folder " module " has no rule in tests/lint/lint.awk")
}

{
    columns = $0
    gsub(/[\200-\277]/, "", columns) # UTF-8's continuation bytes are no columns
    if (length(columns) > columns_max)
        say("size", length(columns) " columns, at most " columns_max)
    if ($0 ~ /\t/)
        say("size", "a tab")
    # (in two parts, so that this file does not hold the words)
    if ($0 ~ ("(^|[^A-Za-z_])(TO" "DO|FIX" "ME|X" "XX)([^A-Za-z_]|$)"))
        say("unfinished", "work that was put off")
    if (!in_comment && $0 ~ /^[ \t]*#[ \t]*include/) {
        check_include($0)
        next
    }
    code = code_of($0)
    if (match(code, before banned "[ \t]*\\("))
        say("banned", substr(code, RSTART, RLENGTH) "...): unbounded, never used here")
    if (is_library && match(code, before banned_library "[ \t]*\\("))
        say("library", substr(code, RSTART, RLENGTH) "...): libraries neither print nor exit")
    if (is_library && code ~ /(^|[^A-Za-z0-9_])stdout([^A-Za-z0-9_]|$)/)
        say("library", "stdout: libraries do not print")
    if (is_core && match(code, before io_call "[ \t]*\\("))
        say("core-io", "a core does no I/O: " substr(code, RSTART, RLENGTH) "...)")
    if (is_core && code ~ /(^|[^A-Za-z0-9_])(stdout|stderr|stdin|errno)([^A-Za-z0-9_]|$)/)
        say("core-io", "a core does no I/O: a standard stream or errno")
    if ($0 == "{")
        function_start = FNR
    if ($0 == "}" && function_start) {
        if (FNR - function_start > function_lines_max)
            say("size", "a function of " (FNR - function_start) " lines, at most " \
                        function_lines_max)
        function_start = 0
    }
    if (FNR == file_lines_max + 1)
        say("size", "a file of more than " file_lines_max " lines")
    # Fail points are listed for those who read the architecture, not the code.
    if (module != "tests" && match($0, /sh_failpoint_hit\([^,()]*, "[^"]*"/)) {
        point = substr($0, RSTART, RLENGTH)
        sub(/^[^"]*"/, "", point)
        sub(/".*$/, "", point)
        if (index(points, " " point " ") == 0)
            say("failpoint", "'" point "' is not in docs/architecture.md")
    }
}

END {
    exit found ? 1 : 0
}
