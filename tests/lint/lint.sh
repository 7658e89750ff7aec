#!/bin/sh
# Checks the rules that a compiler cannot see. Needs sh, find, sort, xargs, grep and awk only.
#
#     lint.sh [ROOT]            exit 0: clean, 1: violations (one a line), 2: nothing to check
#     lint.sh --format [ROOT]   the same for the layout; 77 where clang-format is not installed
#
#   layers        which module may use which (docs/architecture.md draws it)
#   include-path  quoted includes are paths from the root
#   internal      *_internal.h is for its own module
#   library-home  one module knows a library, nobody else
#   core-io       the node's and coordinator's cores and shared/sync do no I/O
#   banned        unbounded string functions, alloca
#   library       shared/ and trainer/ neither print nor exit
#   failpoint     a fail point in the code is listed in docs/architecture.md
#   size          columns, lines of a function and of a file
#   unfinished    work that was put off
set -u

# Other versions of clang-format lay out some lines in another way.
FORMAT_VERSION=14

format=no
if [ "${1:-}" = --format ]; then
    format=yes
    shift
fi
here=$(cd "$(dirname "$0")" && pwd)
cd "${1:-$here/../..}" || exit 2
LC_ALL=C
export LC_ALL

list_files() {
    for folder in shared trainer edge-node aggregator experiments tests; do
        if [ -d "$folder" ]; then
            find "$folder" -name '*.[ch]' -type f
        fi
    done | sort
}

files=$(list_files)
if [ -z "$files" ]; then
    echo "lint: no source file in $(pwd)"
    exit 2
fi

# Runs a command with all files as arguments.
with_files() {
    echo "$files" | tr '\n' '\0' | xargs -0 "$@"
}

check_rules() {
    points=' '
    if [ -f docs/architecture.md ]; then
        # shellcheck disable=SC2016  # these are Markdown's quotes
        points=" $(grep -o '`[a-z0-9._-]*`' docs/architecture.md | tr -d '`' | tr '\n' ' ')"
    fi
    with_files awk -v points="$points" -f "$here/lint.awk"
}

check_format() {
    if ! command -v clang-format >/dev/null 2>&1; then
        echo "SKIP: the format was not checked: clang-format is not installed"
        exit 77
    fi
    if ! clang-format --version | grep -q "version $FORMAT_VERSION\."; then
        echo "SKIP: the format was not checked: clang-format is not version $FORMAT_VERSION"
        exit 77
    fi
    wrong=$(with_files clang-format --dry-run --Werror --ferror-limit=1 2>&1 |
        sed -n 's/^\([^:]*:[0-9]*\):.*clang-format-violations.*/\1: format: run clang-format -i/p')
    [ -z "$wrong" ] || echo "$wrong"
    [ -z "$wrong" ]
}

status=0
if [ "$format" = yes ]; then
    check_format || status=1
else
    check_rules || status=1
fi
echo "lint: $(echo "$files" | wc -l) files"
exit "$status"
