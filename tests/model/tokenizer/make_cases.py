#!/usr/bin/env python3
"""Vocabularies and texts for the comparison with llama.cpp: see README.md.

  make_cases.py vocab KIND PRE FILE     a vocabulary as GGUF; KIND bpe or spm; PRE - for none
  make_cases.py texts SEED COUNT FILE   texts, each a 32-bit length and bytes
  make_cases.py join TEXTS OUT NAME=IDS ...
        cases as JSON; IDS has two lines a text: ids, and ids with special tokens parsed
"""
import collections
import json
import random
import struct
import sys

MERGES = 700
NO_TOKEN = {0x01, 0xF1, 0xC0, 0xC1} | set(range(0xF5, 0x100))  # bytes that bpe has no token of
WORDS = ("the of and to in is that for it was on are as with his they be at one have this from or "
         "had by hot but some what there we can out other were all your when up use word how said "
         "an each she which do their time if will way about many then them would write like so "
         "these her long make thing see him two has look more day could go come did my sound no "
         "most number who over know water than call first people may down side been now find any "
         "HELLO World camelCase XMLHttpRequest snake_case naïve Ærøskøbing straße ΑΒΓδε Москва "
         "İstanbul ǅungla ʼn ªº").split()
CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "'Re", "'vE", "'D", "'x",
                "’s", "'", "''", "'ſ", "'\u212a", "'r", "'l"]
NUMBERS = ["0", "7", "42", "123", "1234", "12345", "123456", "1000000", "3.14", "1,000", "²", "½",
           "Ⅷ", "٣٤٥", "१२३४", "①②", "𝟘𝟙𝟚", "１２３", "0x1F", "〇", "五"]
SPACES = [" ", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\t\t", " \n", "\n ", "  \n  ",
          "\u00a0", "\u3000", "\u2028", "\u0085", "\u2003\u2003", "\v", "\f", " \u00a0 ", "\x1c",
          "\u200b", "\u1680", "    ", "\r", "\n\n\n  \t"]
SIGNS = list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + [
    "...", "--", "==", "!=", "?!", "/*", "*/", "//", "```", "$$", "…", "。", "，", "、", "।", "۔",
    "،", "¿", "«", "»", "€", "£", "¬", "±", "→", "★", "：", "！", "‘", "’", "“", "”", ".\n", ";\r\n",
    "/\n", "//\n\n", "|", "(", ")"]
SCRIPTS = ["中文字符", "日本語テキスト", "かな", "한국어", "ไทย", "हिन्दी", "العربية", "עברית", "ქართული",
           "ᄀᄁ", "ꙮ", "ℵℂ", "ⅷ", "ﬁ", "𝔘𝔫𝔦", "𠀀𠀁", "𮯰", "⿼", "ೝ", "༄", "ࠀ", "Ⴀ", "ǆ", "ʰ", "가나다", "龥龦"]
MARKS = ["e\u0301", "n\u0303o", "\u0301", "a\u20dd", "क्", "\u200d", "\ufe0f", "Z͑ͫ̓", "\u0301\u0302"]
EMOJI = ["😀", "👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇩🇪", "☃", "❤️", "🫠", "1️⃣"]
ODD = ["\x00", "\x01", "\x1b", "\x7f", "\u0378", "\ue000", "\U0010ffff", "\U000f0000", "\ufffe",
       "\U00040000", "\ufffd", "\ufeff", "\u00ad"]
SPECIAL = ["<|endoftext|>", "<|user|>", "<|tool|>", "<|im_end|>", "<unk>", "::", "</s>", "<s>",
           "<|", "|>", "<|user|", "<<|tool|>>", "[EMPTY_9]"]
BROKEN = [b"\x80", b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xc0\x80", b"\xc1\xa1",
          b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xed\xb0\x80", b"\xf8\x88\x80\x80\x80", b"\xfe",
          b"\xe2\x28\xa1", b"\xf0\x28\x8c\xbc", b"\xbf\xbf", b"\xef\xbf\xbf", b"\xf4\x8f\xbf\xbf",
          b"\xe2\x96", b"\xe2\x96\x81", b"\xf1\x80\x80\x80", b"\xc4\xa0", b"\xf0\x80\x80\xaf"]


def text(rng):
    kinds = [(WORDS, 30), (CONTRACTIONS, 8), (NUMBERS, 10), (SPACES, 26), (SIGNS, 16), (SCRIPTS, 8),
             (MARKS, 4), (EMOJI, 3), (ODD, 3), (SPECIAL, 2), (BROKEN, 2)]
    flat = [k for k, weight in kinds for _ in range(weight)]
    out = b""
    for _ in range(rng.randrange(1, 16)):
        piece = rng.choice(rng.choice(flat))
        piece = piece.encode() if isinstance(piece, str) else piece
        if rng.random() < 0.2:  # cut short, so that bytes and letters meet others
            piece = piece[:rng.randrange(len(piece)) + 1]
        out += piece * (rng.randrange(1, 5) if rng.random() < 0.08 else 1)
    if rng.random() < 0.05:
        out += bytes(rng.randrange(256) for _ in range(rng.randrange(1, 12)))
    return out


def texts(seed, count):
    rng = random.Random(seed)
    return [text(rng) for _ in range(count)]


def corpus():
    """What merges are learnt from: no special tokens, no broken bytes, and no words' ends: merges
    cross them, so that a rule that cuts a text wrongly gives other ids."""
    rng = random.Random(7)
    lists = [WORDS] * 5 + [SPACES] * 5 + [CONTRACTIONS, NUMBERS, NUMBERS, SIGNS, SIGNS, SCRIPTS,
                                         MARKS, EMOJI]
    return "".join(rng.choice(rng.choice(lists)) for _ in range(14000))


def learn(symbols):
    merges = []
    for _ in range(MERGES):
        pairs = collections.Counter(zip(symbols, symbols[1:]))
        (a, b), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        merges.append((a, b))
        out, i = [], 0
        while i < len(symbols):
            if i + 1 < len(symbols) and symbols[i] == a and symbols[i + 1] == b:
                out.append(a + b)
                i += 2
            else:
                out.append(symbols[i])
                i += 1
        symbols = out
    return merges


def byte_texts():
    own = [b for b in range(256) if 0x21 <= b <= 0x7E or (b >= 0xA1 and b != 0xAD)]
    others = [b for b in range(256) if b not in own]
    table = {b: chr(b) for b in own}
    table.update({b: chr(256 + i) for i, b in enumerate(others)})
    return table


NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6
ENDING = [("<|endoftext|>", CONTROL), ("<|user|>", USER), ("<|tool|>", CONTROL),
          ("<|im_end|>", NORMAL), ("::", USER)]


def bpe_vocab():
    table = byte_texts()
    merges = learn([table[b] for b in corpus().encode()])
    tokens = [(table[b], NORMAL) for b in range(256) if b not in NO_TOKEN]
    seen = {t for t, _ in tokens}
    kept = []
    for a, b in merges:
        if a in seen and b in seen:
            kept.append(a + " " + b)
            if a + b not in seen:
                tokens.append((a + b, NORMAL))
                seen.add(a + b)
    tokens += [("<unk>", UNKNOWN)] + ENDING
    return tokens, kept, None


def spm_vocab():
    tokens = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    tokens += [("<0x%02X>" % b, BYTE) for b in range(256)]
    # What lies between spaces stays together: a merge that crossed them would hide the rest.
    symbols = list(corpus().replace(" ", "\u2581"))
    merges = learn(symbols)
    seen = {t for t, _ in tokens}
    scores = [0.0] * len(tokens)
    for rank, t in enumerate([a + b for a, b in merges]):
        if t not in seen:
            tokens.append((t, NORMAL))
            scores.append(-float(rank // 3))  # ties, too
            seen.add(t)
    for letter in sorted(set(symbols))[:300]:
        if letter not in seen:
            tokens.append((letter, NORMAL))
            scores.append(-1000.0)
            seen.add(letter)
    tokens += ENDING
    scores += [0.0] * len(ENDING)
    return tokens, None, scores


def gguf_string(s):
    data = s.encode()
    return struct.pack("<Q", len(data)) + data


def key(name, kind, data):
    return gguf_string(name) + struct.pack("<I", kind) + data


def array(kind, items):
    return struct.pack("<IQ", kind, len(items)) + b"".join(items)


def write_vocab(kind, pre, path):
    tokens, merges, scores = bpe_vocab() if kind == "bpe" else spm_vocab()
    ids = {t: i for i, (t, _) in enumerate(tokens)}
    u32 = lambda v: struct.pack("<I", v)
    keys = [key("general.architecture", 8, gguf_string("llama")),
            key("tokenizer.ggml.model", 8, gguf_string("gpt2" if kind == "bpe" else "llama"))]
    if pre != "-":
        keys.append(key("tokenizer.ggml.pre", 8, gguf_string(pre)))
    keys.append(key("tokenizer.ggml.tokens", 9, array(8, [gguf_string(t) for t, _ in tokens])))
    keys.append(key("tokenizer.ggml.token_type", 9, array(5, [u32(k) for _, k in tokens])))
    if merges is not None:
        keys.append(key("tokenizer.ggml.merges", 9, array(8, [gguf_string(m) for m in merges])))
    if scores is not None:
        keys.append(key("tokenizer.ggml.scores", 9, array(6, [struct.pack("<f", s)
                                                             for s in scores])))
    bos, eos = ("<|endoftext|>",) * 2 if kind == "bpe" else ("<s>", "</s>")
    keys.append(key("tokenizer.ggml.bos_token_id", 4, u32(ids[bos])))
    keys.append(key("tokenizer.ggml.eos_token_id", 4, u32(ids[eos])))
    # A loader for vocabularies only still wants these.
    for name, v in (("context_length", 64), ("embedding_length", 8), ("block_count", 1),
                    ("feed_forward_length", 8), ("attention.head_count", 1)):
        keys.append(key("llama." + name, 4, u32(v)))
    keys.append(key("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)))
    with open(path, "wb") as f:
        f.write(b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys)) + b"".join(keys))


def write_texts(seed, count, path):
    with open(path, "wb") as f:
        for t in texts(int(seed), int(count)):
            f.write(struct.pack("<I", len(t)) + t)


def read_texts(path):
    data, out, at = open(path, "rb").read(), [], 0
    while at < len(data):
        n = struct.unpack_from("<I", data, at)[0]
        out.append(data[at + 4:at + 4 + n])
        at += 4 + n
    return out


def join(texts_path, out_path, *sources):
    given = read_texts(texts_path)
    rules = {}
    for source in sources:
        name, path = source.split("=", 1)
        lines = open(path).read().split("\n")
        plain, special = lines[0:2 * len(given):2], lines[1:2 * len(given):2]
        rules[name] = {"ids": plain, "special": {str(i): s for i, (p, s) in
                                                 enumerate(zip(plain, special)) if p != s}}
    with open(out_path, "w") as f:
        json.dump({"texts": [t.hex() for t in given], "rules": rules}, f, indent=0,
                  separators=(",", ":"))
        f.write("\n")


if __name__ == "__main__":
    {"vocab": write_vocab, "texts": write_texts, "join": join}[sys.argv[1]](*sys.argv[2:])
