# Makes shared/model/tokenizer_unicode_table.h from the UnicodeData.txt of Unicode 15.1 on standard
# input, or of 15.0 (Debian bookworm's package unicode-data), to which it adds what 15.1 added:
#   awk -f tests/model/tokenizer/unicode_table.awk /usr/share/unicode/UnicodeData.txt \
#       > shared/model/tokenizer_unicode_table.h
BEGIN {
    FS = ";"
    for (i = 0; i < 16; i++)
        digit[substr("0123456789ABCDEF", i + 1, 1)] = i
    class["L"] = "L"; class["N"] = "N"; class["P"] = "P"; class["S"] = "S"; class["M"] = "M"
    class["Z"] = "W"; class["C"] = "O"
    next_code = 0
    last_class = ""
    extra_n = split("2FFC:2FFF:S;31EF:31EF:S;2EBF0:2EE5D:L", extra, ";")
    extra_at = 1
    order_extras()
}

function value(hex,    i, v)
{
    v = 0
    for (i = 1; i <= length(hex); i++)
        v = v * 16 + digit[substr(hex, i, 1)]
    return v
}

function order_extras(    i, part)
{
    for (i = 1; i <= extra_n; i++) {
        split(extra[i], part, ":")
        extra_first[i] = value(part[1]); extra_last[i] = value(part[2]); extra_class[i] = part[3]
    }
}

function add(first, last, c)
{
    if (first > next_code)
        run(next_code, "O") # unassigned
    run(first, c)
    next_code = last + 1
}

function run(first, c)
{
    if (c == last_class)
        return
    runs[++n_runs] = sprintf("{0x%X, %s},", first, c)
    last_class = c
}

{
    code = value($1)
    if ($2 ~ /First>$/) {
        first = code
        next
    }
    if ($2 !~ /Last>$/)
        first = code
    while (extra_at <= extra_n && extra_first[extra_at] < first) {
        if (next_code <= extra_first[extra_at])
            add(extra_first[extra_at], extra_last[extra_at], extra_class[extra_at])
        extra_at++
    }
    c = class[substr($3, 1, 1)]
    if ((code >= 9 && code <= 13) || code == 133)
        c = "W" # white space of category Cc
    add(first, code, c)
}

END {
    run(next_code, "O")
    print "/* Runs of code points of one class, of Unicode 15.1. Made by"
    print " * tests/model/tokenizer/unicode_table.awk; included by tokenizer_unicode.c only. */"
    print "/* clang-format off */"
    line = ""
    for (i = 1; i <= n_runs; i++) {
        if (length(line) + length(runs[i]) > 98) {
            print line
            line = ""
        }
        line = line (line == "" ? "" : " ") runs[i]
    }
    print line
    print "/* clang-format on */"
}
