/*
 * shoal-corpus: cuts the texts of Debian's packages into what an experiment needs.
 *
 * Input: the King James Bible as `bible -f` prints it (one verse a line, "Ge1:1 In the …") and the
 * Free On-line Dictionary of Computing as dictd's text. Output, one passage a line:
 *   base-train.txt, base-heldout.txt            what the base model is trained on and tried with
 *   before-{traffic,gate,heldout}.txt           the same kind of English, never trained on
 *   topic-NN-{traffic,gate,heldout}.txt         one topic of the dictionary each
 *   manifest.json                               sizes, counts, SHA-256 of each file
 * Whole chapters and whole entries go to one split, chosen by the hash of their name, so the splits
 * are the same on every machine. A passage of which more than SHARED_MAX of the 8-word shingles
 * stand in an earlier passage is dropped: held-out text is taken first, then gate, traffic, base,
 * so nothing that is scored was seen.
 */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/file.h"
#include "shared/base/hash.h"
#include "shared/base/json.h"
#include "shared/base/log.h"
#include "shared/base/option.h"

#define INPUT_MAX     (64u << 20)
#define OUTPUT_MAX    (64u << 20)
#define PASSAGE_BYTES 700 /* a passage ends at the first sentence end past this */
#define PASSAGE_MIN   120
#define SHINGLE_WORDS 8
#define SHARED_MAX    0.2
#define TOPICS_MAX    64
#define TAGS_MAX      1024
#define SHINGLE_SLOTS (1u << 23)
#define PASSAGES_MAX  200000u

typedef enum {
    SPLIT_HELDOUT,
    SPLIT_GATE,
    SPLIT_TRAFFIC,
    SPLIT_BASE,
    SPLIT_BASE_HELDOUT,
    SPLITS
} split;
static const char *const split_names[SPLITS] = {"heldout", "gate", "traffic", "train", "heldout"};

typedef struct {
    char *text;    /* owned */
    uint32_t unit; /* chapter or entry */
    int16_t tag;   /* -1: the Bible */
    uint8_t split;
    bool dropped;
} passage;

typedef struct {
    char name[32];
    uint64_t bytes;
} tag_row;

typedef struct {
    passage *passages;
    size_t n_passages;
    tag_row tags[TAGS_MAX];
    size_t n_tags;
    uint32_t n_units;
    uint64_t *shingles; /* open addressing, 0 is empty */
    uint64_t n_shingles;
} corpus;

typedef struct {
    const char *bible, *foldoc, *out;
    int64_t topics;
} options;

static const sh_option option_table[] = {
    SH_OPT_STRING(options, bible, 0, "bible", "FILE", NULL, "output of `bible -f gen1:1-rev22:21`"),
    SH_OPT_STRING(options, foldoc, 0, "foldoc", "FILE", NULL, "uncompressed foldoc.dict"),
    SH_OPT_STRING(options, out, 'o', "out", "DIR", NULL, "folder to write"),
    SH_OPT_INT(options, topics, 0, "topics", "N", 16, 1, TOPICS_MAX, "largest topics to keep"),
};
static const sh_command command = {
    "shoal-corpus",
    "--bible FILE --foldoc FILE --out DIR",
    option_table,
    SH_COUNT(option_table),
    "Cuts the texts of Debian's packages into disjoint, de-duplicated splits.",
    "shoal-corpus --bible kjv.txt --foldoc foldoc.txt --out texts"};

/* A number in [0, 1) from a name: which split its text goes to. */
static double name_share(const char *name)
{
    sh_hash h = sh_blake2b(name, strlen(name));
    uint64_t x = 0;
    for (int i = 0; i < 6; i++)
        x = x << 8 | h.b[i];
    return (double)x / (double)(1ull << 48);
}

static uint8_t split_of(const char *name, bool bible)
{
    double u = name_share(name);
    if (!bible)
        return u < 0.10 ? SPLIT_HELDOUT : u < 0.20 ? SPLIT_GATE : SPLIT_TRAFFIC;
    return u < 0.02   ? SPLIT_HELDOUT
           : u < 0.04 ? SPLIT_GATE
           : u < 0.18 ? SPLIT_TRAFFIC
           : u < 0.20 ? SPLIT_BASE_HELDOUT
                      : SPLIT_BASE;
}

static sh_status add_passage(corpus *c, const char *text, size_t n, passage like, sh_error *err)
{
    while (n && text[n - 1] == ' ')
        n--;
    if (n < PASSAGE_MIN)
        return SH_OK;
    if (c->n_passages == PASSAGES_MAX)
        return sh_fail(err, SH_ERR_LIMIT, "more than %u passages", PASSAGES_MAX);
    like.text = malloc(n + 1);
    if (!like.text)
        return sh_fail(err, SH_ERR_NO_MEMORY, "no memory for a passage");
    memcpy(like.text, text, n);
    like.text[n] = 0;
    c->passages[c->n_passages++] = like;
    return SH_OK;
}

/* Cuts one unit's running text into passages at sentence ends. */
static sh_status cut(corpus *c, const char *text, size_t n, passage like, sh_error *err)
{
    size_t start = 0;
    for (size_t i = 0; i < n; i++) {
        bool end = strchr(".!?", text[i]) && (i + 1 == n || text[i + 1] == ' ');
        if (end && i + 1 - start >= PASSAGE_BYTES) {
            SH_TRY(add_passage(c, text + start, i + 1 - start, like, err));
            start = i + 2 <= n ? i + 2 : n;
        }
    }
    return start < n ? add_passage(c, text + start, n - start, like, err) : SH_OK;
}

static sh_status read_bible(corpus *c, char *text, sh_error *err)
{
    sh_buf chapter;
    sh_buf_init(&chapter, 1u << 20);
    char name[32] = "";
    sh_status status = SH_OK;
    char *line = text;
    for (;;) {
        char *end = line ? strchr(line, '\n') : NULL;
        if (end)
            *end = 0;
        char *space = line ? strchr(line, ' ') : NULL, *colon = line ? strchr(line, ':') : NULL;
        bool verse = space && colon && colon < space && (size_t)(colon - line) < sizeof name;
        size_t key = verse ? (size_t)(colon - line) : 0;
        if (!verse || strncmp(name, line, key) != 0 || name[key] != 0) {
            passage like = {.unit = c->n_units++, .tag = -1, .split = split_of(name, true)};
            SH_GOTO(cut(c, (const char *)chapter.data, chapter.len, like, err));
            sh_buf_clear(&chapter);
            if (!verse)
                break;
            memcpy(name, line, key);
            name[key] = 0;
        }
        SH_GOTO(sh_buf_printf(&chapter, "%s%s", chapter.len ? " " : "", space + 1));
        line = end ? end + 1 : NULL;
    }
cleanup:
    sh_buf_release(&chapter);
    return status;
}

/* "   <networking, standard> text" -> "networking"; false when the line has no tag. */
static bool parse_tag(const char *line, char *out, size_t out_bytes, const char **rest)
{
    while (*line == ' ')
        line++;
    const char *close = *line == '<' ? strchr(line, '>') : NULL;
    if (!close)
        return false;
    size_t n = strcspn(line + 1, ",>");
    if (n == 0 || n >= out_bytes)
        return false;
    memcpy(out, line + 1, n);
    out[n] = 0;
    *rest = close + 1;
    return true;
}

static int tag_index(corpus *c, const char *name)
{
    for (size_t i = 0; i < c->n_tags; i++)
        if (strcmp(c->tags[i].name, name) == 0)
            return (int)i;
    if (c->n_tags == TAGS_MAX)
        return -1;
    snprintf(c->tags[c->n_tags].name, sizeof c->tags[0].name, "%s", name);
    return (int)c->n_tags++;
}

/* Appends a body line: braces off, white space folded. */
static sh_status append_folded(sh_buf *out, const char *s)
{
    bool space = out->len > 0;
    for (; *s; s++) {
        if (*s == ' ' || *s == '\t') {
            space = out->len > 0;
        } else if (!strchr("{}", *s)) {
            SH_TRY(sh_buf_printf(out, "%s%c", space ? " " : "", *s));
            space = false;
        }
    }
    return SH_OK;
}

static bool is_date_line(const char *s)
{
    while (*s == ' ')
        s++;
    return s[0] == '(' && isdigit((unsigned char)s[1]) && isdigit((unsigned char)s[4]) &&
           s[5] == '-' && strlen(s) <= 14;
}

typedef struct {
    sh_buf body;
    char head[128], tag[32];
    bool tagged;
} entry;

static sh_status end_entry(corpus *c, entry *e, sh_error *err)
{
    int tag = e->tagged ? tag_index(c, e->tag) : -1;
    if (tag >= 0) {
        passage like = {
            .unit = c->n_units++, .tag = (int16_t)tag, .split = split_of(e->head, false)};
        SH_TRY(cut(c, (const char *)e->body.data, e->body.len, like, err));
    }
    sh_buf_clear(&e->body);
    e->tagged = false;
    return SH_OK;
}

/* An entry begins with an unindented headword; its body is indented and begins with its tag. */
static sh_status read_foldoc(corpus *c, char *text, sh_error *err)
{
    entry e = {0};
    sh_buf_init(&e.body, 4u << 20);
    sh_status status = SH_OK;
    for (char *line = text; line;) {
        char *end = strchr(line, '\n');
        if (end)
            *end = 0;
        if (line[0] && line[0] != ' ') {
            SH_GOTO(end_entry(c, &e, err));
            snprintf(e.head, sizeof e.head, "%s", line);
        } else if (line[0]) {
            const char *rest = line;
            if (!e.tagged) {
                e.tagged = parse_tag(line, e.tag, sizeof e.tag, &rest);
                if (e.tagged)
                    SH_GOTO(sh_buf_printf(&e.body, "%s:", e.head));
            }
            if (e.tagged && !is_date_line(rest))
                SH_GOTO(append_folded(&e.body, rest));
        }
        line = end ? end + 1 : NULL;
    }
    SH_GOTO(end_entry(c, &e, err));
cleanup:
    sh_buf_release(&e.body);
    return status;
}

static uint64_t fnv(uint64_t h, unsigned char b)
{
    return (h ^ b) * 1099511628211ull;
}

/* Hashes of the passage's 8-word shingles, letters only and folded; at most max. */
static size_t shingles_of(const char *text, uint64_t *out, size_t max)
{
    uint64_t words[SHINGLE_WORDS] = {0}, word = 1469598103934665603ull;
    size_t n_words = 0, n = 0;
    bool in_word = false;
    for (const char *s = text;; s++) {
        if (isalnum((unsigned char)*s)) {
            word = fnv(word, (unsigned char)tolower((unsigned char)*s));
            in_word = true;
            continue;
        }
        if (in_word) {
            words[n_words++ % SHINGLE_WORDS] = word;
            word = 1469598103934665603ull;
            in_word = false;
            if (n_words >= SHINGLE_WORDS && n < max) {
                uint64_t h = 1469598103934665603ull;
                for (size_t i = 0; i < SHINGLE_WORDS; i++)
                    for (int b = 0; b < 8; b++)
                        h = fnv(h,
                                (unsigned char)(words[(n_words + i) % SHINGLE_WORDS] >> (8 * b)));
                out[n++] = h ? h : 1;
            }
        }
        if (!*s)
            return n;
    }
}

/* Finds h in the set; adds it when add is true. */
static bool shingle_seen(corpus *c, uint64_t h, bool add)
{
    size_t i = (size_t)(h & (SHINGLE_SLOTS - 1));
    while (c->shingles[i] && c->shingles[i] != h)
        i = (i + 1) & (SHINGLE_SLOTS - 1);
    bool seen = c->shingles[i] == h;
    if (!seen && add && c->n_shingles < SHINGLE_SLOTS / 2) {
        c->shingles[i] = h;
        c->n_shingles++;
    }
    return seen;
}

/* Earlier splits first: what is scored is never dropped for what is trained on. */
static void deduplicate(corpus *c)
{
    static uint64_t hashes[4096];
    for (int s = 0; s < SPLITS; s++)
        for (size_t i = 0; i < c->n_passages; i++) {
            passage *p = &c->passages[i];
            if (p->split != s)
                continue;
            size_t n = shingles_of(p->text, hashes, SH_COUNT(hashes)), seen = 0;
            for (size_t k = 0; k < n; k++)
                seen += shingle_seen(c, hashes[k], false);
            p->dropped = n == 0 || (double)seen > SHARED_MAX * (double)n;
            for (size_t k = 0; k < n && !p->dropped; k++)
                shingle_seen(c, hashes[k], true);
        }
}

static sh_status write_split(const corpus *c, const char *dir, const char *prefix, int tag, split s,
                             json_t *files, sh_error *err)
{
    sh_buf out;
    sh_buf_init(&out, OUTPUT_MAX);
    char name[128], path[SH_PATH_BYTES], hex[SH_HASH_HEX_BYTES];
    sh_status status = SH_OK;
    size_t n = 0, dropped = 0;
    for (size_t i = 0; i < c->n_passages; i++) {
        const passage *p = &c->passages[i];
        if (p->tag != tag || p->split != s)
            continue;
        dropped += p->dropped;
        if (p->dropped)
            continue;
        SH_GOTO(sh_buf_printf(&out, "%s\n", p->text));
        n++;
    }
    snprintf(name, sizeof name, "%s-%s.txt", prefix, split_names[s]);
    SH_GOTO(sh_path_join(path, sizeof path, dir, name, err));
    SH_GOTO(sh_file_write_atomic(path, out.data, out.len, err));
    sh_hash h = sh_sha256(out.data, out.len);
    sh_hex(h.b, sizeof h.b, hex);
    json_t *row = json_object();
    sh_json_set(row, "file", json_string(name));
    sh_json_set(row, "passages", json_integer((json_int_t)n));
    sh_json_set(row, "dropped", json_integer((json_int_t)dropped));
    sh_json_set(row, "bytes", json_integer((json_int_t)out.len));
    sh_json_set(row, "sha256", json_string(hex));
    json_array_append_new(files, row);
cleanup:
    sh_buf_release(&out);
    return status;
}

static int by_bytes(const void *a, const void *b)
{
    const tag_row *const *x = a, *const *y = b;
    if ((*x)->bytes != (*y)->bytes)
        return (*x)->bytes < (*y)->bytes ? 1 : -1;
    return strcmp((*x)->name, (*y)->name);
}

static sh_status write_topics(corpus *c, const options *o, json_t *manifest, json_t *files,
                              sh_error *err)
{
    static const tag_row *order[TAGS_MAX];
    json_t *topics = json_array();
    sh_json_set(manifest, "topics", topics);
    for (size_t i = 0; i < c->n_passages; i++)
        if (c->passages[i].tag >= 0 && !c->passages[i].dropped &&
            c->passages[i].split == SPLIT_TRAFFIC)
            c->tags[c->passages[i].tag].bytes += strlen(c->passages[i].text);
    for (size_t i = 0; i < c->n_tags; i++)
        order[i] = &c->tags[i];
    qsort(order, c->n_tags, sizeof order[0], by_bytes);
    for (size_t t = 0; t < (size_t)o->topics && t < c->n_tags; t++) {
        char prefix[32];
        snprintf(prefix, sizeof prefix, "topic-%02zu", t);
        json_array_append_new(topics, json_string(order[t]->name));
        for (split s = SPLIT_HELDOUT; s <= SPLIT_TRAFFIC; s++)
            SH_TRY(write_split(c, o->out, prefix, (int)(order[t] - c->tags), s, files, err));
    }
    return SH_OK;
}

static sh_status run(corpus *c, const options *o, sh_error *err)
{
    uint8_t *bible = NULL, *foldoc = NULL;
    size_t n = 0;
    char path[SH_PATH_BYTES];
    json_t *manifest = json_object(), *files = json_array();
    sh_json_set(manifest, "files", files);
    sh_status status = SH_OK;
    if (!o->bible || !o->foldoc || !o->out)
        SH_GOTO(sh_fail(err, SH_ERR_USAGE, "--bible, --foldoc and --out are needed; see --help"));
    SH_GOTO(sh_file_read(o->bible, INPUT_MAX, &bible, &n, err));
    SH_GOTO(sh_file_read(o->foldoc, INPUT_MAX, &foldoc, &n, err));
    SH_GOTO(read_bible(c, (char *)bible, err));
    if (c->n_passages == 0)
        SH_GOTO(sh_fail(err, SH_ERR_INVALID,
                        "%s: no verse found; it should be what `bible -f gen1:1-rev22:21` prints",
                        o->bible));
    SH_GOTO(read_foldoc(c, (char *)foldoc, err));
    if (c->n_tags < (size_t)o->topics)
        SH_GOTO(sh_fail(err, SH_ERR_INVALID, "%s: %zu topics found, %d wanted", o->foldoc,
                        c->n_tags, (int)o->topics));
    deduplicate(c);
    SH_GOTO(sh_dir_make(o->out, err));
    for (split s = SPLIT_HELDOUT; s <= SPLIT_TRAFFIC; s++)
        SH_GOTO(write_split(c, o->out, "before", -1, s, files, err));
    for (split s = SPLIT_BASE; s <= SPLIT_BASE_HELDOUT; s++)
        SH_GOTO(write_split(c, o->out, "base", -1, s, files, err));
    SH_GOTO(write_topics(c, o, manifest, files, err));
    SH_GOTO(sh_path_join(path, sizeof path, o->out, "manifest.json", err));
    SH_GOTO(sh_json_save(path, manifest, err));
cleanup:
    json_decref(manifest);
    free(bible);
    free(foldoc);
    return status;
}

int main(int argc, char **argv)
{
    sh_error err = {0};
    options o;
    sh_args args = {0};
    sh_buf help;
    sh_buf_init(&help, 65536);
    corpus c = {0};
    sh_status status = sh_crypto_init(&err);
    if (status == SH_OK)
        status = sh_options_parse(&command, argc, argv, &o, &args, &err);
    if (status == SH_OK && args.help) {
        status = sh_options_help(&command, &help);
        fwrite(help.data, 1, help.len, stdout);
    } else if (status == SH_OK) {
        c.passages = sh_calloc(PASSAGES_MAX, sizeof *c.passages);
        c.shingles = sh_calloc(SHINGLE_SLOTS, sizeof *c.shingles);
        status = c.passages && c.shingles ? run(&c, &o, &err)
                                          : sh_fail(&err, SH_ERR_NO_MEMORY, "no memory");
    }
    for (size_t i = 0; i < c.n_passages; i++)
        free(c.passages[i].text);
    free(c.passages);
    free(c.shingles);
    sh_buf_release(&help);
    sh_args_release(&args);
    return status == SH_OK ? 0 : sh_error_report("shoal-corpus", &err);
}
