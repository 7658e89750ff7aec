// A node that was written from docs/protocol.md, with npm's "zeromq" and "@msgpack/msgpack" and no
// code of ours, against an aggregator that runs:
//
//   node protocol_node.mjs ENDPOINT BUNDLE TOKEN
//
// TOKEN is an enrolment token in hexadecimal digits. It enrols, checks in, takes a release down and
// verifies it, pushes windows, sends things twice and out of order, first in version 3, then with
// the same key in version 1, then with another key, then as a copy of its own store. On stdout one
// line of JSON: what the test then looks for in the aggregator's store.
import assert from "node:assert/strict";
import { createHash, createPublicKey, randomBytes, verify } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { decode, encode } from "@msgpack/msgpack";
import * as zmq from "zeromq";

const [endpoint, bundle, invitation] = process.argv.slice(2);
assert(invitation, "usage: node protocol_node.mjs ENDPOINT BUNDLE TOKEN");

// ---- BLAKE2b-256: RFC 7693, section 3, unkeyed ----

const MASK = (1n << 64n) - 1n;
const IV = [
    0x6a09e667f3bcc908n, 0xbb67ae8584caa73bn, 0x3c6ef372fe94f82bn, 0xa54ff53a5f1d36f1n,
    0x510e527fade682d1n, 0x9b05688c2b3e6c1fn, 0x1f83d9abfb41bd6bn, 0x5be0cd19137e2179n,
];
const SIGMA = [
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
    [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4],
    [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
    [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13],
    [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
    [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11],
    [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
    [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5],
    [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
];
const rotate = (x, n) => ((x >> n) | (x << (64n - n))) & MASK;

function mix(v, a, b, c, d, x, y) {
    v[a] = (v[a] + v[b] + x) & MASK;
    v[d] = rotate(v[d] ^ v[a], 32n);
    v[c] = (v[c] + v[d]) & MASK;
    v[b] = rotate(v[b] ^ v[c], 24n);
    v[a] = (v[a] + v[b] + y) & MASK;
    v[d] = rotate(v[d] ^ v[a], 16n);
    v[c] = (v[c] + v[d]) & MASK;
    v[b] = rotate(v[b] ^ v[c], 63n);
}

function blake2b(bytes) {
    const h = [...IV];
    h[0] ^= 0x01010020n; // 32 bytes of output, no key
    for (let at = 0, last = false; !last; at += 128) {
        last = at + 128 >= bytes.length;
        const block = Buffer.alloc(128);
        Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).copy(block, 0, at, at + 128);
        const m = Array.from({ length: 16 }, (_, i) => block.readBigUInt64LE(8 * i));
        const v = [...h, ...IV];
        v[12] ^= BigInt(last ? bytes.length : at + 128);
        if (last) v[14] ^= MASK;
        for (let r = 0; r < 12; r++) {
            const s = SIGMA[r % 10];
            for (let i = 0; i < 4; i++)
                mix(v, i, 4 + i, 8 + i, 12 + i, m[s[2 * i]], m[s[2 * i + 1]]);
            for (let i = 0; i < 4; i++)
                mix(v, i, 4 + ((i + 1) % 4), 8 + ((i + 2) % 4), 12 + ((i + 3) % 4),
                    m[s[8 + 2 * i]], m[s[9 + 2 * i]]);
        }
        for (let i = 0; i < 8; i++) h[i] ^= v[i] ^ v[i + 8];
    }
    const out = Buffer.alloc(32);
    for (let i = 0; i < 4; i++) out.writeBigUInt64LE(h[i], 8 * i);
    return out;
}
assert.equal(blake2b(Buffer.from("abc")).toString("hex"),
    "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319");

// ---- messages ----

const ENROL = 1, WELCOME = 2, CHECKIN = 3, PLAN = 4, ITEM = 5, ACK = 6, WANT = 7, CHUNK = 8;
const ERROR = 9, ROTATE = 10, NAMES = ["", "enrol", "welcome", "checkin", "plan", "item", "ack", "want",
    "chunk", "error", "rotate"];
const WINDOW_CLASS = 2, WINDOW_KIND = 3, TOMBSTONE_KIND = 4;
const NONE = Buffer.alloc(0);

// MessagePack in the shortest forms; numbers of 2^32 and more are BigInts on both sides.
const pack = (fields) => Buffer.from(encode(fields, { useBigInt64: true }));
const unpack = (bytes) => decode(bytes, { useBigInt64: true });
const u64 = (n) => (BigInt(n) < 1n << 32n ? Number(n) : BigInt(n));

function message(version, type, fields) {
    const body = pack(fields);
    return pack([version, type, blake2b(body).subarray(0, 16), body]);
}

class Link {
    constructor(keys, server, version) {
        this.version = version;
        this.socket = new zmq.Dealer({
            curvePublicKey: keys.publicKey,
            curveSecretKey: keys.secretKey,
            curveServerKey: server,
            immediate: true,
            linger: 0,
            sendHighWaterMark: 256,
            receiveHighWaterMark: 256,
            maxMessageSize: 1 << 20,
            heartbeatInterval: 5000,
            heartbeatTimeout: 15000,
            heartbeatTimeToLive: 15000,
            receiveTimeout: 60000,
            sendTimeout: 60000,
        });
        this.socket.connect(endpoint);
    }

    async send(type, fields, version = this.version) {
        await this.socket.send(message(version, type, fields));
    }

    async receive(inVersion = this.version) {
        const frames = await this.socket.receive();
        assert.equal(frames.length, 1, "one message is one frame");
        const [version, type, hash, body, ...more] = unpack(frames[0]);
        assert.equal(more.length, 0);
        assert.equal(version, inVersion, "answered in the version that it was spoken to in");
        assert(blake2b(body).subarray(0, 16).equals(hash), "the body's hash");
        return { type, fields: unpack(body) };
    }

    // The answer to what is sent. An ERROR comes beside an ACK or in its place.
    async ask(type, fields, wanted) {
        await this.send(type, fields);
        const answer = await this.receive();
        assert.equal(NAMES[answer.type], NAMES[wanted], JSON.stringify(answer.fields, text));
        return answer.fields;
    }

    close() {
        this.socket.close();
    }
}
const text = (_, value) => (typeof value === "bigint" ? String(value) : value);

// ---- a window ----

const varint = (n) => {
    const out = [];
    for (n = BigInt(n); n > 127n; n >>= 7n) out.push(Number(n & 127n) | 128);
    return Buffer.from([...out, Number(n)]);
};
const zigzag = (n) => varint(((BigInt(n) << 1n) ^ (BigInt(n) >> 63n)) & MASK);
const varints = (numbers) => Buffer.concat(numbers.map(varint));
const zeros = (n) => varints(Array(n).fill(0));
const float = (x) => {
    const out = Buffer.alloc(4);
    out.writeFloatLE(x);
    return out;
};

// Three inferences: 30 tokens in, 12 out, two accepted, one rejected.
function makeWindow(origin, index, release) {
    const unit = 1n << 20n;
    const metric = (n, sum, squares, bins) =>
        Buffer.concat([varint(n), zigzag(sum), varint(squares), varints(bins)]);
    const bins = (at, n) => Array.from({ length: 16 }, (_, i) => (i === at ? n : 0));
    const none = metric(0, 0, 0, bins(0, 0));
    const body = Buffer.concat([
        varints([origin, index, 1, release, 3 * index + 1, 2, 1767225600000, 900, 3, 30, 12]),
        varints([0, 2, 0, 1]), varints([3, 0, 0, 0, 0, 0, 0, 0]), varint(0),
        zigzag(-3n * unit), zigzag(2n * unit), zigzag(0), float(-2.5),
        metric(3, 12n * unit, 48n * unit, bins(4, 3)), // likelihood: 4 nats each
        metric(3, unit, unit, [2, ...Array(14).fill(0), 1]), // rejections
        none, none, none, none,
        varints([1, 300, 0, 3]), varints([0]), // three first tokens in one bucket; no token times
        Buffer.alloc(256), zeros(64), zeros(16 + 136), varints([0, 0, 0, 0]),
    ]);
    const head = Buffer.alloc(16);
    head.write("SHWN");
    head.writeUInt16LE(1, 4);
    head.set([0, 6, 16, 16, 64, 0], 6);
    head.writeUInt32LE(16 + body.length + 8, 12);
    const all = Buffer.concat([head, body]);
    return Buffer.concat([all, blake2b(all).subarray(0, 8)]);
}

// ---- what the release key signed ----

const hexFile = (name) => Buffer.from(readFileSync(join(bundle, name), "utf8").trim(), "hex");
const releaseKey = createPublicKey({
    key: { kty: "OKP", crv: "Ed25519", x: hexFile("release.pub").toString("base64url") },
    format: "jwk",
});

function signed(bytes) {
    const at = bytes.length - 64;
    assert(at > 0);
    assert(verify(null, bytes.subarray(0, at), releaseKey, bytes.subarray(at)), "the signature");
    return unpack(bytes.subarray(0, at));
}

function readManifest(bytes) {
    const [magic, version, release, parent, , [sha256, size, chunks], format, ...rest] =
        signed(bytes);
    assert.equal(magic, "shoal-manifest");
    assert.equal(version, 1);
    assert.equal(rest.length, 4);
    assert(Number(parent) < Number(release));
    assert.equal(chunks.length, 32 * Math.ceil(Number(size) / 65536));
    return { release, sha256, size: Number(size), chunks, format };
}

// ---- a node ----

// A start: its lease, and the sequences that its first items got; only windows are made here.
const start = (nextWindow, lease = randomBytes(32)) => {
    const sequences = Buffer.alloc(32);
    [1, 1, nextWindow, 1].forEach((seq, i) => sequences.writeBigUInt64BE(BigInt(seq), 8 * i));
    return { lease, sequences, name: u64(lease.readBigUInt64BE()) };
};
const drawEpoch = () => randomBytes(8).readBigUInt64BE() | (1n << 63n);

class Node {
    constructor(link, epoch) {
        this.link = link;
        this.epoch = epoch;
    }

    // Returns what of WELCOME says whether its epoch is its own.
    async enrol(starts = [], token = NONE, expected = true) {
        this.name = starts.length > 0 ? starts[0].name : 0;
        const fields = [this.epoch, "protocol_node 1", "javascript", 2, u64(8n << 30n)];
        if (this.link.version >= 3)
            fields.push("laptop", u64(1n << 30n), 2, token,
                Buffer.concat(starts.map((s) => s.lease)),
                Buffer.concat(starts.map((s) => s.sequences)));
        const welcome = await this.link.ask(ENROL, fields, WELCOME);
        assert.equal(welcome.length, this.link.version >= 3 ? 8 : 2);
        const [accepted, why, renew, , epoch, common, name, parted] = welcome;
        assert.equal(accepted, expected, why);
        if (accepted && epoch !== undefined) assert.equal(epoch, this.epoch);
        if (accepted && name !== undefined) assert.equal(name, this.name, "an answer to this start");
        return { renew, common, parted: parted && Buffer.from(parted).toString("hex") };
    }

    // State up, plan down.
    async checkin(release) {
        const fields = [this.epoch, BigInt(Date.now()), release, release, 0, 0, 0, 0, 0, 0,
            0, 0, 0, 0, 3, 1, false];
        if (this.link.version >= 3) fields.push(u64(1n << 34n), 4096, 65536, 0, 0, 4 | 8, 0, 0, 0, 0);
        const plan = await this.link.ask(CHECKIN, fields, PLAN);
        assert.equal(plan.length, this.link.version >= 3 ? 5 : 3);
        assert(Number(plan[0]) > 0, "when to return");
        return { manifest: plan[2], time: plan[4] ?? NONE };
    }

    async item(seq, payload, kind = WINDOW_KIND, last = seq) {
        const fields = [this.epoch, WINDOW_CLASS, seq, kind, last, payload];
        if (this.link.version >= 3) fields.push(this.name);
        const [epoch, cls, high, bitmap, name] = await this.link.ask(ITEM, fields, ACK);
        if (this.link.version >= 3) assert.equal(name, this.name, "of this start");
        assert.equal(epoch, this.epoch);
        assert.equal(cls, WINDOW_CLASS);
        return [Number(high), Buffer.from(bitmap).toString("hex")];
    }

    async fetch(manifest) {
        const parts = [];
        for (let at = 0; at < manifest.chunks.length; at += 32) {
            const name = Buffer.from(manifest.chunks.subarray(at, at + 32));
            const [hash, bytes] = await this.link.ask(WANT, [name], CHUNK);
            assert(name.equals(hash) && blake2b(bytes).equals(name), "the chunk's hash");
            parts.push(bytes);
        }
        const model = Buffer.concat(parts);
        assert.equal(model.length, manifest.size);
        assert(createHash("sha256").update(model).digest().equals(manifest.sha256), "SHA-256");
        return model;
    }
}

// Z85, RFC 32.
const digits =
    "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#";
const z85 = (bytes) => {
    let out = "";
    for (let at = 0; at < bytes.length; at += 4) {
        const n = bytes.readUInt32BE(at);
        for (let power = 85 ** 4; power >= 1; power /= 85)
            out += digits[Math.floor(n / power) % 85];
    }
    return out;
};
const unz85 = (string) => {
    const out = Buffer.alloc((string.length / 5) * 4);
    for (let at = 0; at < string.length; at += 5) {
        let n = 0;
        for (const c of string.slice(at, at + 5)) n = n * 85 + digits.indexOf(c);
        out.writeUInt32BE(n, (at / 5) * 4);
    }
    return out;
};

const server = z85(hexFile("aggregator.pub"));
const keys = zmq.curveKeyPair();
const key = unz85(keys.publicKey).toString("hex");

// Version 3. First with a token that is none: let in, told no, and shut out.
let node = new Node(new Link(keys, server, 3), drawEpoch());
await node.enrol([], randomBytes(32), false);
node.link.close();
const first = node.epoch, began = start(1);
node.link = new Link(keys, server, 3);
const { renew } = await node.enrol([began], Buffer.from(invitation, "hex"));
assert.equal(renew, false, "nobody else has this epoch");
const plan = await node.checkin(0);
const manifest = readManifest(plan.manifest);
if (plan.time.length > 0) {
    const [magic, version, now] = signed(plan.time);
    assert.deepEqual([magic, version], ["shoal-time", 1]);
    assert(Math.abs(Number(now) - Date.now()) < 3600_000, "the aggregator's time");
}
const model = await node.fetch(manifest);
assert.equal(model.toString("latin1", 0, 4), "GGUF");
assert.equal(model.compare(readFileSync(join(bundle, "genesis.gguf"))), 0);
assert.equal((await node.checkin(Number(manifest.release))).manifest.length, 0, "it has it");

const windows = [1, 2, 3, 4].map((i) => makeWindow(77, i, Number(manifest.release)));
assert.deepEqual(await node.item(1, windows[0]), [1, ""]);
assert.deepEqual(await node.item(1, windows[0]), [1, ""], "the same again, the same answer");
assert.deepEqual(await node.item(3, windows[2]), [1, "02"], "ahead: bit 1 is sequence 3");
assert.deepEqual(await node.item(2, NONE, TOMBSTONE_KIND), [3, ""], "dropped: it may pass");
assert.deepEqual(await node.item(2, windows[1]), [3, ""], "too late: a duplicate");

// What is wrong is answered, changes nothing, and ends nothing.
async function refused(status, version, bytes) {
    await node.link.socket.send(bytes);
    const { type, fields } = await node.link.receive(version);
    assert.equal(NAMES[type], "error");
    assert.equal(fields[0], status, fields[1]);
}
await refused("invalid", 1, message(3, CHECKIN, [1, 2])); // answered in a version that all read
await refused("unsupported", 3, message(9, CHECKIN, []));
const broken = message(3, WANT, [manifest.chunks.subarray(0, 32)]);
broken[broken.length - 1] ^= 1;
await refused("corrupt", 1, broken);
await refused("not-found", 3, message(3, WANT, [blake2b(broken)]));
await node.link.socket.send([message(3, ENROL, []), NONE]); // two frames: not heard
assert.deepEqual(await node.item(1, windows[0]), [3, ""]);
node.link.close();

// The same store under version 1, as of an old program: it goes on where it was.
node = new Node(new Link(keys, server, 1), first);
await node.enrol();
await node.checkin(Number(manifest.release));
assert.deepEqual(await node.item(4, windows[3]), [4, ""]);
assert.deepEqual(await node.item(4, windows[3]), [4, ""]);
node.link.close();

// Another key, and the same node. The next start: its lease, and the one of the start before; one
// that was never welcomed is in the list, too.
const next = start(5), token = randomBytes(32), fresh = zmq.curveKeyPair();
node = new Node(new Link(keys, server, 3), first);
assert.equal((await node.enrol([next, start(5), began])).renew, false);
const [pending, nothing] = await node.link.ask(ROTATE, [unz85(fresh.publicKey), token], ROTATE);
assert(unz85(fresh.publicKey).equals(pending) && nothing.length === 0);
node.link.close();
node.link = new Link(fresh, server, 3);
assert.equal((await node.enrol([next], token)).renew, false);
assert.deepEqual(await node.item(4, windows[3]), [4, ""], "it goes on under the new key");
node.link.close();

// And a copy of the store from before that start: it is told to renew, and where the two parted. Its
// new epoch is made of the first lease that the other has not.
const copy = start(5);
node = new Node(new Link(fresh, server, 3), first);
const told = await node.enrol([copy, began]);
const parted = copy.sequences.toString("hex"); // the other one's next start began there, too
assert.deepEqual(told, { renew: true, common: 1, parted }, "another sender has this epoch");
node.epoch = blake2b(copy.lease).readBigUInt64LE();
if (node.epoch < 1n << 32n) node.epoch = Number(node.epoch);
assert.equal((await node.enrol([start(1, copy.lease)])).renew, false);
assert.deepEqual(await node.item(1, makeWindow(78, 5, Number(manifest.release))), [1, ""]);
node.link.close();

console.log(JSON.stringify({ key, epochs: [first, node.epoch].map(String), model: model.length }));
