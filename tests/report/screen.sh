#!/bin/sh
# The report as a browser draws it: a screenshot that holds something, a print that does, and
# not a word from the browser about scripts or missing parts. Skips where there is no Chromium.
#   sh screen.sh BUILD/bin/shoal tests/report
set -u
shoal=$1 here=$2
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome) || {
    echo "SKIP: report_screen: there is no chromium here"
    exit 77
}
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT

fail() {
    echo "FAIL: $*" >&2
    exit 1
}

draw() { # draw FLAGS...: headless, no network
    timeout 120 "$browser" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage \
        --user-data-dir="$dir/profile" \
        --host-resolver-rules="MAP * ~NOTFOUND" "$@" "file://$dir/report.html" \
        >"$dir/log" 2>&1
}

cp "$here/sample_summary.json" "$dir/summary.json"
"$shoal" report --out "$dir" --format html >/dev/null || fail "no report was made"
[ "$(wc -c <"$dir/report.html")" -le 500000 ] || fail "the page is over 500 KB"
draw --screenshot="$dir/page.png" --window-size=1000,3000 || {
    echo "SKIP: report_screen: the browser does not start here: $(tail -n 1 "$dir/log")"
    exit 77
}
[ -s "$dir/page.png" ] || fail "no screenshot: $(tail -n 3 "$dir/log")"
# An empty page of that size is a few KB of PNG; text, tables and plots are far more.
size=$(wc -c <"$dir/page.png")
[ "$size" -gt 60000 ] || fail "the screenshot has $size bytes: nothing is drawn"
draw --print-to-pdf="$dir/page.pdf" --no-pdf-header-footer || fail "it does not print"
head -c 5 "$dir/page.pdf" | grep -q '^%PDF-' || fail "the print is no PDF"
printed=$(wc -c <"$dir/page.pdf")
[ "$printed" -gt 30000 ] || fail "the print has $printed bytes: nothing is on it"
! grep -q 'CONSOLE' "$dir/log" || fail "the browser says: $(grep CONSOLE "$dir/log")"
echo "ok: screenshot of $size bytes, print of $printed"
