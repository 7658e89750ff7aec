#!/bin/sh
# `shoal report` as a command: exit codes, what goes to which stream, what is written.
#   sh cli.sh BUILD/bin/shoal tests/report
set -u
shoal=$1 here=$2
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
failed=0

fail() {
    echo "FAIL: $*" >&2
    failed=1
}

# expect CODE NAME ARGUMENTS...: the exit code, and for an error one line on stderr, none on stdout.
expect() {
    code=$1 name=$2
    shift 2
    "$shoal" report "$@" >"$dir/out" 2>"$dir/err"
    got=$?
    [ "$got" -eq "$code" ] || fail "$name: exit $got, expected $code: $(cat "$dir/err")"
    if [ "$code" -ne 0 ]; then
        [ "$(wc -l <"$dir/err")" -eq 1 ] || fail "$name: stderr is not one line: $(cat "$dir/err")"
        [ -s "$dir/out" ] && fail "$name: an error wrote to stdout"
    elif [ -s "$dir/err" ]; then
        fail "$name: stderr: $(cat "$dir/err")"
    fi
}

run=$dir/run
mkdir "$run"
expect 2 "no --out"
expect 2 "missing folder" --out "$dir/none"
expect 2 "folder without a summary" --out "$run"
printf '{"seed": ' >"$run/summary.json"
expect 2 "cut-off summary" --out "$run"
printf '[1, 2]' >"$run/summary.json"
expect 2 "summary that is no object" --out "$run"
[ -e "$run/report.json" ] && fail "an error left a report behind"
cp "$here/sample_summary.json" "$run/summary.json"
expect 2 "unknown format" --out "$run" --format pdf
expect 0 "text" --out "$run"
cmp "$dir/out" "$here/sample_report.txt" >/dev/null ||
    fail "text differs: $(diff "$here/sample_report.txt" "$dir/out" | head -5)"
expect 0 "json" --out "$run" --format json
[ "$(wc -l <"$dir/out")" -eq 1 ] || fail "json is not one line"
grep -q '"action": *"promote"' "$dir/out" || fail "json has no recommended action"
expect 0 "html" --out "$run" --format html
[ "$(cat "$dir/out")" = "$run/report.html" ] || fail "html printed '$(cat "$dir/out")'"
for file in report.json report.html plots/loss.svg plots/acceptance.svg plots/drift.svg; do
    [ -s "$run/$file" ] || fail "$file was not written"
done
[ "$failed" -eq 0 ] && echo "ok: shoal report"
exit "$failed"
