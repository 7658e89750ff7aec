/*
 * The stages, then the table of rules. A stage's comment is the expression that it stands for, with
 * alternatives tried from left to right; "find" means that what lies between two matches is a piece
 * of its own. Where a run of white space is met, "\s+(?!\S)" leaves its last character to the word
 * that follows.
 */
#include "shared/model/tokenizer_pre.h"

#include <string.h>

#include "shared/base/status.h"

static sh_char_class class_of(sh_pre_char c)
{
    return (sh_char_class)(c >> 24);
}

static bool is_letter(sh_pre_char c)
{
    return class_of(c) == SH_CLASS_LETTER;
}

static bool is_number(sh_pre_char c)
{
    return class_of(c) == SH_CLASS_NUMBER;
}

static bool is_space(sh_pre_char c)
{
    return class_of(c) == SH_CLASS_SPACE;
}

static bool is_newline(sh_pre_char c)
{
    return sh_pre_code(c) == '\n' || sh_pre_code(c) == '\r';
}

static bool is_newline_or_slash(sh_pre_char c)
{
    return is_newline(c) || sh_pre_code(c) == '/';
}

static bool is_punctuation(sh_pre_char c)
{
    return class_of(c) == SH_CLASS_PUNCTUATION;
}

/* [\p{P}\p{S}], of which llama.cpp's table for ASCII leaves out "~". */
static bool is_punctuation_or_symbol(sh_pre_char c)
{
    return is_punctuation(c) || (class_of(c) == SH_CLASS_SYMBOL && sh_pre_code(c) != '~');
}

static bool is_ascii_sign(sh_pre_char c)
{
    return sh_pre_code(c) < 128 && (is_punctuation_or_symbol(c) || sh_pre_code(c) == '~');
}

static bool is_letter_or_mark(sh_pre_char c)
{
    return is_letter(c) || class_of(c) == SH_CLASS_MARK;
}

/* [^\s\p{L}\p{N}] */
static bool is_sign(sh_pre_char c)
{
    return !is_space(c) && !is_letter(c) && !is_number(c);
}

static bool is_ascii_digit(sh_pre_char c)
{
    return sh_pre_code(c) - '0' < 10;
}

static bool is_ascii_upper(sh_pre_char c)
{
    return sh_pre_code(c) - 'A' < 26;
}

static bool is_ascii_lower(sh_pre_char c)
{
    return sh_pre_code(c) - 'a' < 26;
}

static bool is_ascii_letter(sh_pre_char c)
{
    return is_ascii_upper(c) || is_ascii_lower(c);
}

typedef bool (*predicate)(sh_pre_char);

/* The end of the run of `is` that begins at `at`; `at` where there is none. */
static size_t run_end(const sh_pre_char *c, size_t at, size_t end, predicate is)
{
    while (at < end && is(c[at]))
        at++;
    return at;
}

/* "[is]+", find */
static size_t split_runs(const sh_pre_char *c, size_t at, size_t end, predicate is)
{
    if (is(c[at]))
        return run_end(c, at, end, is);
    while (at < end && !is(c[at]))
        at++;
    return at;
}

/* "[is]", find */
static size_t split_singles(const sh_pre_char *c, size_t at, size_t end, predicate is)
{
    return is(c[at]) ? at + 1 : split_runs(c, at, end, is);
}

/* Whether "[before]?[is]+" matches at `at`. */
static bool match_with_one_before(const sh_pre_char *c, size_t at, size_t end, predicate before,
                                  predicate is)
{
    return is(c[at]) || (before(c[at]) && at + 1 < end && is(c[at + 1]));
}

/* "[before]?[is]+", find */
static size_t split_with_one_before(const sh_pre_char *c, size_t at, size_t end, predicate before,
                                    predicate is)
{
    if (match_with_one_before(c, at, end, before, is))
        return run_end(c, at + 1, end, is);
    while (at < end && !match_with_one_before(c, at, end, before, is))
        at++;
    return at;
}

/* 's|'t|'re|'ve|'m|'ll|'d: its end, or `at`. */
static size_t contraction_end(const sh_pre_char *c, size_t at, size_t end, bool any_case)
{
    static const char *const two[] = {"re", "ve", "ll"};
    if (sh_pre_code(c[at]) != '\'' || at + 1 >= end)
        return at;
    uint32_t a = sh_pre_code(c[at + 1]);
    if (any_case && is_ascii_upper(a))
        a += 'a' - 'A';
    if (a == 's' || a == 't' || a == 'm' || a == 'd')
        return at + 2;
    if (at + 2 >= end)
        return at;
    uint32_t b = sh_pre_code(c[at + 2]);
    if (any_case && is_ascii_upper(b))
        b += 'a' - 'A';
    for (size_t i = 0; i < SH_COUNT(two); i++)
        if (a == (uint32_t)two[i][0] && b == (uint32_t)two[i][1])
            return at + 3;
    return at;
}

/* \s+(?!\S)|\s+ at white space */
static size_t space_end(const sh_pre_char *c, size_t at, size_t end)
{
    const size_t stop = run_end(c, at, end, is_space);
    return stop - at > 1 && stop < end ? stop - 1 : stop;
}

/* \s*[\r\n]+|\s+(?!\S)|\s+ at white space */
static size_t space_or_lines_end(const sh_pre_char *c, size_t at, size_t end)
{
    for (size_t stop = run_end(c, at, end, is_space); stop > at; stop--)
        if (is_newline(c[stop - 1]))
            return stop;
    return space_end(c, at, end);
}

/* 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
static size_t stage_gpt2(const sh_pre_char *c, size_t at, size_t end)
{
    const size_t contraction = contraction_end(c, at, end, false);
    if (contraction > at)
        return contraction;
    const size_t word = sh_pre_code(c[at]) == ' ' && at + 1 < end ? at + 1 : at;
    if (is_letter(c[word]))
        return run_end(c, word, end, is_letter);
    if (is_number(c[word]))
        return run_end(c, word, end, is_number);
    if (is_sign(c[word]))
        return run_end(c, word, end, is_sign);
    return space_end(c, at, end);
}

/* (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}|
 *  ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+ */
static size_t split_llama3(const sh_pre_char *c, size_t at, size_t end, size_t digits)
{
    const size_t contraction = contraction_end(c, at, end, true);
    if (contraction > at)
        return contraction;
    if (is_number(c[at]))
        return run_end(c, at, SH_MIN(end, at + digits), is_number);
    if (is_letter(c[at]) || (!is_newline(c[at]) && at + 1 < end && is_letter(c[at + 1])))
        return run_end(c, at + 1, end, is_letter);
    const size_t sign = sh_pre_code(c[at]) == ' ' && at + 1 < end ? at + 1 : at;
    if (is_sign(c[sign]))
        return run_end(c, run_end(c, sign, end, is_sign), end, is_newline);
    return space_or_lines_end(c, at, end);
}

static size_t stage_llama3(const sh_pre_char *c, size_t at, size_t end)
{
    return split_llama3(c, at, end, 3);
}

static size_t stage_qwen2(const sh_pre_char *c, size_t at, size_t end)
{
    return split_llama3(c, at, end, 1);
}

/* \p{N}, find */
static size_t stage_number(const sh_pre_char *c, size_t at, size_t end)
{
    return split_singles(c, at, end, is_number);
}

/* \p{N}+, find */
static size_t stage_numbers(const sh_pre_char *c, size_t at, size_t end)
{
    return split_runs(c, at, end, is_number);
}

/* \p{N}{1,3}, find */
static size_t stage_numbers_by_three(const sh_pre_char *c, size_t at, size_t end)
{
    return is_number(c[at]) ? run_end(c, at, SH_MIN(end, at + 3), is_number)
                            : split_runs(c, at, end, is_number);
}

static bool three_digits(const sh_pre_char *c, size_t at, size_t end)
{
    return end - at >= 3 && is_ascii_digit(c[at]) && is_ascii_digit(c[at + 1]) &&
           is_ascii_digit(c[at + 2]);
}

/* [0-9][0-9][0-9], find */
static size_t stage_three_digits(const sh_pre_char *c, size_t at, size_t end)
{
    if (three_digits(c, at, end))
        return at + 3;
    while (at < end && !three_digits(c, at, end))
        at++;
    return at;
}

static bool is_default_sign(sh_pre_char c)
{
    const uint32_t code = sh_pre_code(c);
    return is_punctuation(c) || (code != 0 && code < 128 && strchr("$+<=>^~|", (int)code) != NULL);
}

static bool is_falcon_sign(sh_pre_char c)
{
    return is_default_sign(c) || sh_pre_code(c) == '`';
}

/* [\p{P}\$\+<=>\^~\|]+, find */
static size_t stage_default_signs(const sh_pre_char *c, size_t at, size_t end)
{
    return split_runs(c, at, end, is_default_sign);
}

/* The same with "`". */
static size_t stage_falcon_signs(const sh_pre_char *c, size_t at, size_t end)
{
    return split_runs(c, at, end, is_falcon_sign);
}

static bool is_blank(sh_pre_char c)
{
    return sh_pre_code(c) == ' ';
}

static bool is_bloom(sh_pre_char c)
{
    static const uint32_t out[] = {'(',    '|',    '.',    ',',    '!',    '?',    ')',
                                   0x2026, 0x3002, 0xFF0C, 0x3001, 0x0964, 0x06D4, 0x060C};
    for (size_t i = 0; i < SH_COUNT(out); i++)
        if (sh_pre_code(c) == out[i])
            return false;
    return !is_space(c);
}

/*  ?[^(\s|.,!?...)]+, find */
static size_t stage_bloom(const sh_pre_char *c, size_t at, size_t end)
{
    return split_with_one_before(c, at, end, is_blank, is_bloom);
}

/* A letter that can begin a word ([^a-z]), and one that can go on with it ([^A-Z]). */
static bool is_head_letter(sh_pre_char c)
{
    return is_letter(c) && !is_ascii_lower(c);
}

static bool is_tail_letter(sh_pre_char c)
{
    return is_letter(c) && !is_ascii_upper(c);
}

/* H*T+|H+T* of letters from `at` on (H head letters, T tail letters). Letters outside ASCII are
 * both: where no tail follows the heads, the last of these among them is the tail. */
static size_t tekken_word_end(const sh_pre_char *c, size_t at, size_t end)
{
    const size_t heads = run_end(c, at, end, is_head_letter);
    if (heads < end && is_tail_letter(c[heads]))
        return run_end(c, heads, end, is_tail_letter);
    for (size_t i = heads; i > at; i--)
        if (is_tail_letter(c[i - 1]))
            return i;
    return heads;
}

/* [^\r\n\p{L}\p{N}]?H*T+|[^\r\n\p{L}\p{N}]?H+T*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|
 * \s*[\r\n]+|\s+(?!\S)|\s+ */
static size_t stage_tekken(const sh_pre_char *c, size_t at, size_t end)
{
    if (is_number(c[at]))
        return at + 1;
    if (is_letter(c[at]))
        return tekken_word_end(c, at, end);
    if (!is_newline(c[at]) && at + 1 < end && is_letter(c[at + 1]))
        return tekken_word_end(c, at + 1, end);
    const size_t sign = sh_pre_code(c[at]) == ' ' && at + 1 < end ? at + 1 : at;
    if (is_sign(c[sign]))
        return run_end(c, run_end(c, sign, end, is_sign), end, is_newline_or_slash);
    return space_or_lines_end(c, at, end);
}

/* [\r\n], find */
static size_t stage_newline(const sh_pre_char *c, size_t at, size_t end)
{
    return split_singles(c, at, end, is_newline);
}

/* \s?\p{L}+, find */
static size_t stage_coder_letters(const sh_pre_char *c, size_t at, size_t end)
{
    return split_with_one_before(c, at, end, is_space, is_letter);
}

/* \s?\p{P}+, find */
static size_t stage_coder_signs(const sh_pre_char *c, size_t at, size_t end)
{
    return split_with_one_before(c, at, end, is_space, is_punctuation);
}

static bool in_range(sh_pre_char c, uint32_t first, uint32_t last)
{
    return sh_pre_code(c) >= first && sh_pre_code(c) <= last;
}

/* The model's own ranges, of which one begins at U+0800: much more than Chinese, Korean. */
static bool is_coder_cjk(sh_pre_char c)
{
    return !is_space(c) && (in_range(c, 0x0800, 0x9FA5) || in_range(c, 0xAC00, 0xD7FF));
}

static size_t stage_coder_cjk(const sh_pre_char *c, size_t at, size_t end)
{
    return split_runs(c, at, end, is_coder_cjk);
}

static bool is_deepseek3_cjk(sh_pre_char c)
{
    return in_range(c, 0x4E00, 0x9FA5) || in_range(c, 0x3040, 0x30FF);
}

static size_t stage_deepseek3_cjk(const sh_pre_char *c, size_t at, size_t end)
{
    return split_runs(c, at, end, is_deepseek3_cjk);
}

/* The end of the match at `at`, or `at`:
 * [ASCII punctuation and symbols][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|
 *  ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+ */
static size_t deepseek3_end(const sh_pre_char *c, size_t at, size_t end)
{
    const bool sign = is_punctuation_or_symbol(c[at]), more = at + 1 < end;
    if (is_ascii_sign(c[at]) && more && is_ascii_letter(c[at + 1]))
        return run_end(c, at + 1, end, is_ascii_letter);
    if (is_letter_or_mark(c[at]) ||
        (!sign && !is_newline(c[at]) && more && is_letter_or_mark(c[at + 1])))
        return run_end(c, at + 1, end, is_letter_or_mark);
    const size_t first = sh_pre_code(c[at]) == ' ' && more ? at + 1 : at;
    if (is_punctuation_or_symbol(c[first]))
        return run_end(c, run_end(c, first, end, is_punctuation_or_symbol), end, is_newline);
    return is_space(c[at]) ? space_or_lines_end(c, at, end) : at;
}

static size_t stage_deepseek3(const sh_pre_char *c, size_t at, size_t end)
{
    const size_t stop = deepseek3_end(c, at, end);
    if (stop > at)
        return stop;
    /* Nothing at `at`: what no alternative takes lasts until one does. Such a character is neither
     * white space nor a letter, so that trying each costs a step. */
    do
        at++;
    while (at < end && deepseek3_end(c, at, end) == at);
    return at;
}

static const sh_pre_rule rules[] = {
    {
        .names = {"default", NULL},
        .stages = {stage_default_signs, stage_gpt2, stage_numbers, stage_three_digits, NULL},
    },
    {
        .names = {"gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v1-en", "jina-v2-es",
                  "jina-v2-de", "jina-v2-code", "roberta-bpe", NULL},
        .stages = {stage_gpt2, NULL},
    },
    {.names = {"mpt", "olmo", "jais", NULL}, .stages = {stage_gpt2, NULL}},
    {
        .names = {"llama-bpe", "llama3", "llama-v3", "falcon3", NULL},
        .stages = {stage_llama3, NULL},
        .whole_words = true,
        .adds_bos = true,
    },
    {.names = {"dbrx", "smaug-bpe", NULL}, .stages = {stage_llama3, NULL}},
    {.names = {"chatglm-bpe", NULL}, .stages = {stage_llama3, NULL}, .no_bos = true},
    {
        .names = {"qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", NULL},
        .stages = {stage_qwen2, NULL},
    },
    {
        .names = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
                  NULL},
        .stages = {stage_number, stage_gpt2, NULL},
    },
    {
        .names = {"falcon", NULL},
        .stages = {stage_falcon_signs, stage_gpt2, stage_three_digits, NULL},
    },
    {.names = {"poro-chat", "bloom", "gpt3-finnish", NULL}, .stages = {stage_bloom, NULL}},
    {.names = {"viking", NULL}, .stages = {stage_bloom, stage_number, NULL}},
    {
        .names = {"tekken", NULL},
        .stages = {stage_tekken, NULL},
        .whole_words = true,
        .adds_bos = true,
    },
    {
        .names = {"deepseek-coder", NULL},
        .stages = {stage_newline, stage_coder_letters, stage_coder_signs, stage_coder_cjk,
                   stage_number, NULL},
    },
    {
        .names = {"deepseek-v3", NULL},
        .stages = {stage_numbers_by_three, stage_deepseek3_cjk, stage_deepseek3, NULL},
    },
};

const sh_pre_rule *sh_pre_find(const char *name, size_t n)
{
    for (size_t i = 0; i < SH_COUNT(rules); i++)
        for (size_t k = 0; rules[i].names[k] != NULL; k++)
            if (strlen(rules[i].names[k]) == n && memcmp(rules[i].names[k], name, n) == 0)
                return &rules[i];
    return NULL;
}

sh_status sh_pre_decode(const char *text, size_t bytes, size_t max, sh_pre_char **chars,
                        size_t *cap, size_t *n)
{
    *n = 0;
    for (size_t at = 0; at < bytes;) {
        unsigned used;
        const uint32_t code = sh_char_decode((const uint8_t *)text + at, bytes - at, &used);
        at += used;
        if (*n == *cap)
            SH_TRY(sh_array_reserve((void **)chars, cap, *n + 1, sizeof **chars, max));
        (*chars)[(*n)++] = sh_pre_char_of(code);
    }
    return SH_OK;
}

/* By the stages from `stage` on; as deep as there are stages. */
static sh_status split(const sh_pre_stage *stage, const sh_pre_char *c, size_t n, sh_pre_word each,
                       void *arg)
{
    if (*stage == NULL)
        return each(arg, c, n);
    for (size_t at = 0; at < n;) {
        const size_t stop = (*stage)(c, at, n);
        SH_TRY(split(stage + 1, c + at, stop - at, each, arg));
        at = stop;
    }
    return SH_OK;
}

sh_status sh_pre_split(const sh_pre_rule *rule, const sh_pre_char *c, size_t n, sh_pre_word each,
                       void *arg)
{
    return split(rule->stages, c, n, each, arg);
}
