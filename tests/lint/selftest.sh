#!/bin/sh
# Tests lint.sh: one planted violation of each rule, in a project of its own, must be found, by its
# rule and at its line; what only looks like a violation must not be.
set -u
here=$(cd "$(dirname "$0")" && pwd)
temp=$(mktemp -d) || exit 2
trap 'rm -rf "$temp"' EXIT
failed=0
cases=0

fresh() {
    rm -rf "$temp/p"
    mkdir -p "$temp/p/docs" "$temp/p/shared/base" "$temp/p/tests"
    # shellcheck disable=SC2016
    echo 'Fail points: `known.point`.' >"$temp/p/docs/architecture.md"
    echo 'int sh_one(void);' >"$temp/p/shared/base/one.h"
}

# plant FILE: writes standard input there
plant() {
    mkdir -p "$temp/p/$(dirname "$1")"
    cat >"$temp/p/$1"
}

# expect RULE FILE LINE: the violation just planted is the only one
expect() {
    cases=$((cases + 1))
    out=$(sh "$here/lint.sh" "$temp/p") && status=0 || status=$?
    if [ "$status" != 1 ] || [ "$(echo "$out" | grep -c "^$2:$3: $1: ")" != 1 ] ||
        [ "$(echo "$out" | grep -c ': ')" != 2 ]; then
        failed=$((failed + 1))
        echo "FAILED: expected '$2:$3: $1: ...' and exit 1, got exit $status and"
        echo "$out" | sed 's/^/    /'
    fi
    fresh
}

expect_clean() {
    cases=$((cases + 1))
    if ! out=$(sh "$here/lint.sh" "$temp/p"); then
        failed=$((failed + 1))
        echo "FAILED: $1 is no violation, but"
        echo "$out" | sed 's/^/    /'
    fi
    fresh
}

# may_not FILE HEADER RULE and may FILE HEADER
may_not() {
    echo "#include $2" | plant "$1"
    expect "$3" "$1" 1
}
may() {
    echo "#include $2" | plant "$1"
    expect_clean "$1 including $2"
}

fresh
expect_clean "the empty project"

# Every pair of modules: the whole drawing, so that no row of the table can be lost.
modules="shared/base shared/math shared/model shared/stats shared/store shared/wire shared/net
         shared/http shared/sync trainer edge-node aggregator experiments"
allowed_for() {
    case $1 in
    shared/base) echo shared/base ;;
    shared/math) echo shared/base shared/math ;;
    shared/model) echo shared/base shared/math shared/model ;;
    shared/sync) echo shared/base shared/store shared/wire shared/sync ;;
    shared/*) echo shared/base "$1" ;;
    trainer) echo shared/base shared/math shared/model trainer ;;
    experiments) echo "$modules" ;;
    *) echo "$modules" | tr ' ' '\n' | grep -v -e edge-node -e aggregator -e experiments && echo "$1" ;;
    esac | tr '\n' ' '
}
for from in $modules; do
    allowed=" $(allowed_for "$from") "
    {
        for to in $modules; do
            case $allowed in
            *" $to "*) echo "#include \"$to/x.h\"" ;;
            esac
        done
    } | plant "$from/user.c"
    expect_clean "$from including $allowed"
    for to in $modules tests; do
        case $allowed in
        *" $to "*) ;;
        *) may_not "$from/user.c" "\"$to/x.h\"" layers ;;
        esac
    done
done
may tests/x/test.c '"aggregator/coordinator.h"'
may tests/x/test.c '"shared/base/option_internal.h"'
may_not shared/base/x.c '"one.h"' include-path
may_not shared/other/x.c '<string.h>' include-path
may_not trainer/x.c '"shared/model/gguf_internal.h"' internal
may shared/model/x.c '"shared/model/gguf_internal.h"'

may_not shared/store/x.c '<msgpack.h>' library-home
may_not shared/wire/x.c '<lmdb.h>' library-home
may_not edge-node/x.c '<zmq.h>' library-home
may_not trainer/x.c '<cblas.h>' library-home
may_not shared/model/x.c '<openblas/lapacke.h>' library-home
may_not shared/base/x.c '<sodium.h>' library-home
may_not edge-node/x.c '<sodium/crypto_sign.h>' library-home
may_not edge-node/x.c '<microhttpd.h>' library-home
may_not shared/base/x.c '<yaml.h>' library-home
may_not experiments/x.c '<jansson.h>' library-home
may shared/wire/x.c '<msgpack.h>'
may shared/store/x.c '<lmdb.h>'
may shared/net/x.c '<zmq.h>'
may shared/math/x.c '<cblas.h>'
may shared/base/hash.c '<sodium.h>'
may shared/http/x.c '<microhttpd.h>'
may tests/wire/x.c '<msgpack.h>'

for core in edge-node/node.c edge-node/node_learn.c aggregator/coordinator_round.c \
    shared/sync/outbox.c; do
    for header in time.h sys/stat.h unistd.h pthread.h fcntl.h; do
        may_not "$core" "<$header>" core-io
    done
    for call in 'fopen(p, "r")' 'printf("x")' 'fprintf(f, "x")' 'time(NULL)' 'rand()' \
        'open(p, 0)' 'socket(1, 2, 3)' 'clock_gettime(c, &t)' 'write (1, p, 2)' 'getenv("HOME")'; do
        if [ "$call" = 'printf("x")' ] && [ "$core" = shared/sync/outbox.c ]; then
            continue # two rules at once
        fi
        printf 'int f(void)\n{\n    return %s;\n}\n' "$call" | plant "$core"
        expect core-io "$core" 3
    done
    may_not "$core" '"shared/base/file.h"' core-io
    plant "$core" <<'END'
#include <stdio.h>
#include <string.h>
int f(struct s *s, char *out)
{
    /* time(NULL) and
     * fopen("x") */
    s->write(1); // printf("x")
    s->io.open("fopen(1)");
    sh_sync_open(s, "a \" quote; printf(1)", '"', '\'');
    next_time(s), uptime (s);
    return snprintf(out, 10, "printf(%d)", 1);
}
END
    expect_clean "$core: comments, strings, members and other names"
done
may edge-node/shell.c '<time.h>'

for call in 'strcpy(a, b)' 'strcat(a, b)' 'sprintf(a, b)' 'gets(a)' 'vsprintf (a, b, c)' 'alloca(9)'; do
    for file in aggregator/x.c tests/x/x.c; do
        printf '/* a\n */ void f(void)\n{\n    if (x)\n        %s;\n}\n' "$call" | plant "$file"
        expect banned "$file" 5
    done
done
for call in 'system("x")' 'exit(1)' 'printf("x")' 'puts("x")' 'popen("x", "r")' 'x = stdout'; do
    printf 'void f(void)\n{\n    %s;\n}\n' "$call" | plant shared/stats/x.c
    expect library shared/stats/x.c 3
    printf 'void f(void)\n{\n    %s;\n}\n' "$call" | plant trainer/x.c
    expect library trainer/x.c 3
    printf 'void f(void)\n{\n    %s;\n}\n' "$call" | plant trainer/train_main.c
    expect_clean "$call in a main"
done
plant shared/stats/x.c <<'END'
__attribute__((format(printf, 1, 2))) void sh_say(const char *format, ...);
END
expect_clean "the attribute printf"

echo 'bool f(void) { return sh_failpoint_hit(x->points, "unknown.point"); }' | plant edge-node/x.c
expect failpoint edge-node/x.c 1
echo 'bool f(void) { return sh_failpoint_hit(x->points, "known.point"); }' | plant edge-node/x.c
expect_clean "a listed fail point"

awk 'BEGIN { s = "// "; while (length(s) < 101) s = s "x"; print s }' | plant shared/base/x.c
expect size shared/base/x.c 1
awk 'BEGIN { s = "// "; while (length(s) < 100) s = s "x"; print s }' | plant shared/base/x.c
expect_clean "a line of 100 columns"
awk 'BEGIN { s = "// "; while (length(s) < 99) s = s "x"; print s "\303\251" }' | plant shared/base/x.c
expect_clean "a line of 100 columns in UTF-8"
printf 'int a;\n\tint b;\n' | plant shared/base/x.c
expect size shared/base/x.c 2
awk 'BEGIN { print "int f(void)\n{"; for (i = 0; i < 100; i++) print "    f();"; print "}" }' |
    plant shared/base/x.c
expect size shared/base/x.c 103
awk 'BEGIN { for (i = 0; i < 1101; i++) print "int a" i ";" }' | plant shared/base/x.c
expect size shared/base/x.c 1101
echo "int a; // TO""DO: the rest" | plant shared/base/x.c
expect unfinished shared/base/x.c 1

# A project without a source is an error, not a pass.
cases=$((cases + 1))
mkdir "$temp/nothing"
sh "$here/lint.sh" "$temp/nothing" >"$temp/out" && status=0 || status=$?
if [ "$status" != 2 ]; then
    failed=$((failed + 1))
    echo "FAILED: a folder without sources: exit $status, 2 expected"
fi

# The format check, where it can run.
fresh
cp "$here/../../.clang-format" "$temp/p/"
out=$(sh "$here/lint.sh" --format "$temp/p") && status=0 || status=$?
if [ "$status" = 77 ]; then
    echo "$out"
else
    cases=$((cases + 2))
    if [ "$status" != 0 ]; then
        failed=$((failed + 1))
        echo "FAILED: a formatted file: exit $status: $out"
    fi
    echo 'int   a ;' | plant shared/base/x.c
    if out=$(sh "$here/lint.sh" --format "$temp/p") || ! echo "$out" | grep -q 'x.c:1: format: '; then
        failed=$((failed + 1))
        echo "FAILED: a file in another format was not found: $out"
    fi
fi

echo "$cases cases, $failed failed"
[ "$failed" = 0 ]
