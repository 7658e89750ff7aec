#include "tests/wire/sample.h"

#include <math.h>
#include <string.h>

/* Numbers of all widths, the ends of the range included. */
static uint64_t number(sh_rng *rng, uint64_t max)
{
    switch (sh_rng_below(rng, 8)) {
    case 0:
        return 0;
    case 1:
        return max;
    default: {
        uint64_t x = sh_rng_u64(rng) >> sh_rng_below(rng, 64);
        return x > max ? x % (max + 1) : x; /* max + 1 is not 0: x is above max */
    }
    }
}

static void fill(sh_rng *rng, void *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ((uint8_t *)bytes)[i] = (uint8_t)sh_rng_u32(rng);
}

static sh_hash hash(sh_rng *rng)
{
    sh_hash h;
    fill(rng, h.b, sizeof(h.b));
    return h;
}

static double real(sh_rng *rng)
{
    return ldexp(sh_rng_unit(rng) - 0.5, (int)sh_rng_below(rng, 200) - 100);
}

static const char *text(sh_rng *rng, size_t max, char *out)
{
    static const char *const pieces[] = {"a", "Z",  " ", "~",   "é",
                                         "ß", "漢", "🐟", "0.1", "\xc2\xa0"};
    size_t want = sh_rng_below(rng, 4) ? sh_rng_below(rng, 40) : SH_WIRE_TEXT_MAX;
    want = SH_MIN(want, max);
    size_t n = 0;
    for (;;) {
        const char *piece = pieces[sh_rng_below(rng, SH_COUNT(pieces))];
        if (n + strlen(piece) > want)
            break;
        memcpy(out + n, piece, strlen(piece));
        n += strlen(piece);
    }
    out[n] = 0;
    return out;
}

static void sample_plan(sh_rng *rng, sh_train_plan *p)
{
    if (sh_rng_below(rng, 3) == 0)
        return; /* stays zero: do not train */
    *p = (sh_train_plan){
        .train = true,
        .round = (uint32_t)number(rng, UINT32_MAX),
        .base_version = number(rng, UINT64_MAX),
        .base_sha256 = hash(rng),
        .a_seed = number(rng, UINT64_MAX),
        .rank = (uint32_t)number(rng, UINT32_MAX),
        .alpha = (float)real(rng),
        .lr = (float)real(rng),
        .lr_final = (float)real(rng),
        .clip = (float)real(rng),
        .batch = (uint32_t)number(rng, UINT32_MAX),
        .context = (uint32_t)number(rng, UINT32_MAX),
        .passes_milli = (uint32_t)number(rng, UINT32_MAX),
        .steps_max = (uint32_t)number(rng, UINT32_MAX),
        .warmup = (uint32_t)number(rng, UINT32_MAX),
        .tokens_min = (uint32_t)number(rng, UINT32_MAX),
    };
}

static void sample_checkin(sh_rng *rng, sh_msg_checkin *c)
{
    *c = (sh_msg_checkin){
        .epoch = number(rng, UINT64_MAX),
        .now_ms = number(rng, UINT64_MAX),
        .active_version = number(rng, UINT64_MAX),
        .confirmed_version = number(rng, UINT64_MAX),
        .installing_version = number(rng, UINT64_MAX),
        .training_round = (uint32_t)number(rng, UINT32_MAX),
        .examples = number(rng, UINT64_MAX),
        .example_tokens = number(rng, UINT64_MAX),
        .outbox_items = number(rng, UINT64_MAX),
        .outbox_bytes = number(rng, UINT64_MAX),
        .inferences = number(rng, UINT64_MAX),
        .windows = number(rng, UINT64_MAX),
        .drifting = sh_rng_below(rng, 2) == 1,
    };
    for (size_t i = 0; i < SH_CLASSES; i++)
        c->dropped[i] = number(rng, UINT64_MAX);
}

static void sample_item(sh_rng *rng, size_t size_max, sample *out)
{
    sh_msg_item *i = &out->msg.item;
    i->epoch = number(rng, UINT64_MAX);
    i->cls = (uint8_t)sh_rng_below(rng, SH_CLASSES);
    i->kind = (uint8_t)(1 + sh_rng_below(rng, 4));
    i->seq = 1 + number(rng, UINT64_MAX - 1);
    i->last_seq = i->seq;
    if (i->kind == SH_ITEM_TOMBSTONE)
        i->last_seq += number(rng, UINT64_MAX - i->seq);
    else
        i->payload = (sh_bytes){out->bytes, number(rng, SH_MIN(size_max, SH_WIRE_ITEM_MAX))};
    fill(rng, out->bytes, i->payload.n);
}

static void sample_ack(sh_rng *rng, sh_msg_ack *ack)
{
    ack->epoch = number(rng, UINT64_MAX);
    ack->cls = (uint8_t)sh_rng_below(rng, SH_CLASSES);
    ack->high_water = number(rng, UINT64_MAX);
    size_t words = sh_rng_below(rng, SH_ACK_BITMAP_WORDS + 1);
    for (size_t i = 0; i < words; i++)
        ack->bitmap[i] = number(rng, UINT64_MAX);
}

void sample_msg(sh_rng *rng, sh_msg_type type, size_t size_max, sample *out)
{
    sh_msg *m = &out->msg;
    memset(m, 0, sizeof(*m));
    m->version = 1;
    m->type = type;
    switch (type) {
    case SH_MSG_ENROL:
        m->enrol.epoch = number(rng, UINT64_MAX);
        m->enrol.agent = text(rng, SH_WIRE_TEXT_MAX, out->text[0]);
        m->enrol.kernel = text(rng, SH_WIRE_TEXT_MAX, out->text[1]);
        m->enrol.cores = (uint32_t)number(rng, UINT32_MAX);
        m->enrol.memory_bytes = number(rng, UINT64_MAX);
        break;
    case SH_MSG_WELCOME:
        m->welcome.accepted = sh_rng_below(rng, 2) == 1;
        m->welcome.text = text(rng, SH_WIRE_TEXT_MAX, out->text[0]);
        break;
    case SH_MSG_CHECKIN:
        sample_checkin(rng, &m->checkin);
        break;
    case SH_MSG_PLAN:
        m->plan.return_after_ms = number(rng, UINT64_MAX);
        sample_plan(rng, &m->plan.train);
        m->plan.manifest = (sh_bytes){
            out->bytes,
            sh_rng_below(rng, 2) ? number(rng, SH_MIN(size_max, SH_WIRE_MANIFEST_MAX)) : 0};
        fill(rng, out->bytes, m->plan.manifest.n);
        break;
    case SH_MSG_ITEM:
        sample_item(rng, size_max, out);
        break;
    case SH_MSG_ACK:
        sample_ack(rng, &m->ack);
        break;
    case SH_MSG_WANT:
        m->want.n = 1 + (uint32_t)sh_rng_below(rng, SH_MIN(SH_WIRE_WANT_MAX, 1 + size_max / 32));
        m->want.hashes = out->hashes;
        fill(rng, out->hashes, (size_t)m->want.n * 32);
        break;
    case SH_MSG_CHUNK:
        m->chunk.hash = hash(rng);
        m->chunk.bytes =
            (sh_bytes){out->bytes, 1 + number(rng, SH_MIN(size_max, SH_CHUNK_BYTES) - 1)};
        fill(rng, out->bytes, m->chunk.bytes.n);
        break;
    case SH_MSG_ERROR:
        m->error =
            (sh_msg_error){text(rng, SH_WIRE_TEXT_MAX, out->text[0]),
                           text(rng, SH_WIRE_TEXT_MAX, out->text[1]), number(rng, UINT64_MAX)};
        break;
    case SH_MSG_ROTATE: /* version 1 has none: sample_msg_3 fills it */
        break;
    }
}

static sh_blob blob(sh_rng *rng, uint8_t *hashes)
{
    uint32_t chunks = (uint32_t)sh_rng_below(rng, 9);
    fill(rng, hashes, (size_t)chunks * 32);
    uint64_t bytes = (uint64_t)chunks * SH_CHUNK_BYTES;
    if (chunks)
        bytes -= sh_rng_below(rng, SH_CHUNK_BYTES);
    return (sh_blob){hash(rng), bytes, chunks, hashes};
}

void sample_msg_2(sh_rng *rng, sample *out)
{
    sh_msg *m = &out->msg;
    m->version = 2;
    if (m->type == SH_MSG_PLAN && sh_rng_below(rng, 3) > 0)
        m->plan.evaluate = (sh_evaluate_plan){1 + number(rng, UINT64_MAX - 1),
                                              number(rng, UINT64_MAX), blob(rng, out->hashes)};
    if (m->type == SH_MSG_ITEM && m->item.kind == SH_ITEM_WINDOW && sh_rng_below(rng, 2))
        m->item.kind = SH_ITEM_EVALUATION;
}

static sh_bytes bin(sh_rng *rng, size_t max, uint8_t *out)
{
    sh_bytes b = {out, sh_rng_below(rng, 3) ? sh_rng_below(rng, max + 1) : max};
    fill(rng, out, b.n);
    return b;
}

static void sample_checkin_3(sh_rng *rng, sh_msg_checkin *c)
{
    c->disk_free = number(rng, UINT64_MAX);
    c->store_bytes = number(rng, UINT64_MAX);
    c->store_bytes_max = number(rng, UINT64_MAX);
    c->refused_full = number(rng, UINT64_MAX);
    c->stores_lost = (uint32_t)number(rng, UINT32_MAX);
    c->conditions = (uint32_t)number(rng, SH_CONDITIONS_ALL);
    c->bytes_up_day = number(rng, UINT64_MAX);
    c->bytes_down_day = number(rng, UINT64_MAX);
    c->nodes = (uint32_t)number(rng, UINT32_MAX);
    c->nodes_drifting = (uint32_t)number(rng, UINT32_MAX);
}

void sample_msg_3(sh_rng *rng, sample *out)
{
    sh_msg *m = &out->msg;
    m->version = 3;
    switch (m->type) {
    case SH_MSG_ENROL:
        m->enrol.device_class = text(rng, SH_WIRE_CLASS_MAX, out->text[2]);
        m->enrol.disk_bytes = number(rng, UINT64_MAX);
        m->enrol.slots = (uint32_t)number(rng, UINT32_MAX);
        m->enrol.token = bin(rng, SH_WIRE_TOKEN_MAX, out->bytes);
        m->enrol.leases.n = (uint32_t)sh_rng_below(rng, SH_WIRE_LEASES_MAX + 1);
        m->enrol.leases.hashes = out->hashes;
        fill(rng, out->hashes, (size_t)m->enrol.leases.n * 32);
        if (sh_rng_below(rng, 2)) /* any bytes do */
            m->enrol.starts = (sh_bytes){out->hashes, (size_t)m->enrol.leases.n * 32};
        break;
    case SH_MSG_WELCOME:
        m->welcome.renew = sh_rng_below(rng, 2) == 1;
        m->welcome.retry_after_ms = number(rng, UINT64_MAX);
        m->welcome.epoch = number(rng, UINT64_MAX);
        m->welcome.common = (uint32_t)number(rng, UINT32_MAX);
        m->welcome.lease = number(rng, UINT64_MAX);
        m->welcome.parted = (sh_bytes){out->bytes, sh_rng_below(rng, 2) ? SH_WIRE_START_BYTES : 0};
        fill(rng, out->bytes, m->welcome.parted.n);
        break;
    case SH_MSG_ITEM:
        m->item.lease = number(rng, UINT64_MAX);
        break;
    case SH_MSG_ACK:
        m->ack.lease = number(rng, UINT64_MAX);
        break;
    case SH_MSG_CHECKIN:
        sample_checkin_3(rng, &m->checkin);
        break;
    case SH_MSG_PLAN:
        m->plan.time = bin(rng, SH_WIRE_TIME_MAX, out->time);
        break;
    case SH_MSG_ROTATE:
        m->rotate.key = hash(rng);
        m->rotate.token = bin(rng, SH_WIRE_TOKEN_MAX, out->bytes);
        break;
    default: /* as in version 2 */
        break;
    }
}

/* With numbers of its own: those of the others are recorded in the corpus. */
static void sample_evaluation(uint64_t seed, sh_evaluation *out)
{
    sh_rng own;
    sh_rng_init(&own, seed, 0, 9);
    *out = (sh_evaluation){
        .candidate = 1 + number(&own, UINT64_MAX - 1),
        .parent_version = number(&own, UINT64_MAX),
        .candidate_sha256 = hash(&own),
        .n = (uint32_t)sh_rng_below(&own, SH_SLICES + 1),
    };
    for (uint32_t i = 0; i < out->n; i++)
        out->slices[i] = (sh_slice_score){i, number(&own, UINT64_MAX), real(&own), real(&own)};
    if (out->n == 1 && sh_rng_below(&own, 2))
        out->slices[0].slice = SH_SLICE_CORRECTED;
}

void sample_payload(sh_rng *rng, sample_payloads *out)
{
    memset(out, 0, sizeof(*out));
    out->update = (sh_update_meta){
        .blob = blob(rng, out->hashes),
        .round = (uint32_t)number(rng, UINT32_MAX),
        .base_version = number(rng, UINT64_MAX),
        .base_sha256 = hash(rng),
        .a_seed = number(rng, UINT64_MAX),
        .rank = (uint32_t)number(rng, UINT32_MAX),
        .alpha = (float)real(rng),
        .samples = number(rng, UINT64_MAX),
        .tokens_seen = number(rng, UINT64_MAX),
        .heldout_before = real(rng),
        .heldout_after = real(rng),
    };
    out->alarm = (sh_alarm){
        .window = number(rng, UINT64_MAX),
        .release_version = number(rng, UINT64_MAX),
        .inferences = number(rng, UINT64_MAX),
        .metric = (uint32_t)number(rng, UINT32_MAX),
        .log_evalue = real(rng),
        .effect = real(rng),
        .at_ms = number(rng, UINT64_MAX),
    };
    uint64_t version = 1 + number(rng, UINT64_MAX - 1);
    out->manifest = (sh_manifest){
        .version = version,
        .parent = number(rng, version - 1 ? version - 1 : 1) % version,
        .created_ms = number(rng, UINT64_MAX),
        .model = blob(rng, out->hashes), /* the same hashes as the update's: refilled, enough */
        .format = "Q8_0",
        .suite_sha256 = hash(rng),
        .gate_loss_parent = real(rng),
        .gate_loss = real(rng),
        .updates_merged = (uint32_t)number(rng, UINT32_MAX),
    };
    out->update.blob.n_chunks = out->manifest.model.n_chunks;
    out->update.blob.bytes = out->manifest.model.bytes;
    sample_evaluation(version, &out->evaluation);
}

/* As a relay passes it on: in sorted parts. */
void sample_relayed(uint64_t seed, uint32_t n, sample_payloads *out)
{
    sh_rng own;
    sh_rng_init(&own, seed, 0, 10);
    SH_ASSERT(n > 0 && n <= SAMPLE_PARTS);
    sh_update_part part = {.node = hash(&own)};
    out->update.samples = 0;
    for (uint32_t i = 0; i < n; i++) {
        /* Here of the same epoch, there of the same node, there of another. */
        uint64_t next = i == 0 ? 0 : sh_rng_below(&own, 3);
        part.node.b[0] = (uint8_t)((i == 0 ? part.node.b[0] % 64 : part.node.b[0]) + (next == 2));
        part.epoch = next == 2 ? number(&own, 1000) : part.epoch + (next == 1);
        part.seq = next == 0 ? part.seq + 1 : 1 + number(&own, 1000);
        part.samples = 1 + number(&own, 1 << 20);
        out->update.samples += part.samples;
        sh_update_part_put(out->parts + (size_t)i * SH_UPDATE_PART_BYTES, &part);
    }
    out->update.parts = (sh_bytes){out->parts, (size_t)n * SH_UPDATE_PART_BYTES};
}

void sample_wrap(uint64_t version, uint8_t type, const void *body, size_t n, sh_buf *out)
{
    SH_ASSERT(version < 128 && type < 128);
    sh_hash h = sh_blake2b(body, n);
    uint8_t head[26] = {0x94, (uint8_t)version, type, 0xc4, 16};
    memcpy(head + 5, h.b, 16);
    size_t at = 21;
    if (n < 0x100) {
        head[at++] = 0xc4;
        head[at++] = (uint8_t)n;
    } else {
        bool wide = n > 0xffff;
        head[at++] = wide ? 0xc6 : 0xc5;
        for (int shift = wide ? 24 : 8; shift >= 0; shift -= 8)
            head[at++] = (uint8_t)(n >> shift);
    }
    sh_status status = sh_buf_append(out, head, at);
    if (status == SH_OK)
        status = sh_buf_append(out, body, n);
    SH_ASSERT(status == SH_OK);
}
