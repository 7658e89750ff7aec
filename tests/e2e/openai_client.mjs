// The stock OpenAI client (npm's "openai") against a node: node openai_client.mjs BASE_URL
// BASE_URL is http://127.0.0.1:PORT/v1. SHOAL_TOKEN in the environment: the node's token, if any.
import assert from "node:assert/strict";
import OpenAI from "openai";

const baseURL = process.argv[2];
assert(baseURL, "usage: node openai_client.mjs http://127.0.0.1:PORT/v1");
const client = new OpenAI({ baseURL, apiKey: process.env.SHOAL_TOKEN || "none", maxRetries: 0 });

async function refused(promise, status, code) {
    await assert.rejects(promise, (e) => {
        assert(e instanceof OpenAI.APIError, `${e}`);
        assert.equal(e.status, status);
        if (code) assert.equal(e.code, code);
        assert(e.message.length > 0);
        return true;
    });
}

// Models.
const models = [];
for await (const model of client.models.list()) models.push(model.id);
assert.equal(models.length, 1);
const model = models[0];
assert.equal((await client.models.retrieve(model)).id, model);
await refused(client.models.retrieve("gpt-4o"), 404, "model_not_found");

// A completion, whole and streamed: greedy, so the same text.
const ask = { model, prompt: "Once upon a time", max_tokens: 12, temperature: 0 };
const whole = await client.completions.create(ask);
assert.match(whole.id, /^cmpl-[0-9a-f]{16}$/);
assert.equal(whole.object, "text_completion");
assert.match(whole.system_fingerprint, /^shoal-release-\d+$/);
assert(["length", "stop"].includes(whole.choices[0].finish_reason));
assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);
assert(whole.usage.completion_tokens >= 1 && whole.usage.completion_tokens <= 12);

let text = "", usage = null, finish = null;
const prints = new Set();
const stream = await client.completions.create({
    ...ask, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
    prints.add(chunk.system_fingerprint);
    if (chunk.usage) usage = chunk.usage;
    for (const choice of chunk.choices) {
        text += choice.text;
        finish = choice.finish_reason ?? finish;
    }
}
assert.equal(prints.size, 1);
if (prints.has(whole.system_fingerprint)) assert.equal(text, whole.choices[0].text);
assert(finish);
assert(usage.total_tokens > 0);

// A chat, whole, streamed, and by the client's own helper.
const messages = [
    { role: "system", content: "Be brief." },
    { role: "user", content: [{ type: "text", text: "Say hello." }] },
];
const chat = await client.chat.completions.create({ model, messages, max_completion_tokens: 8 });
assert.match(chat.id, /^chatcmpl-[0-9a-f]{16}$/);
assert.equal(chat.choices[0].message.role, "assistant");
assert.equal(typeof chat.choices[0].message.content, "string");
const runner = client.chat.completions.stream({ model, messages, max_tokens: 8, temperature: 0 });
const final = await runner.finalChatCompletion();
assert.equal(final.choices[0].message.role, "assistant");

// Many at once, one of which is given up half-way.
await Promise.all([1, 2, 3, 4].map(async (seed) => {
    const many = await client.completions.create({ ...ask, seed, temperature: 1, stream: true });
    for await (const chunk of many) {
        assert(chunk.id);
        if (seed === 1) break; // aborts the request
    }
}));

// Several choices, whole and streamed; log-probabilities in both shapes.
const choices = await client.completions.create({ ...ask, n: 3, logprobs: 2, temperature: 1, seed: 7 });
assert.deepEqual(choices.choices.map((c) => c.index), [0, 1, 2]);
for (const { text, logprobs } of choices.choices) {
    assert.equal(logprobs.tokens.length, logprobs.token_logprobs.length);
    assert.equal(logprobs.tokens.length, logprobs.text_offset.length);
    assert(logprobs.token_logprobs.every((x) => x <= 0));
    assert(text.length === 0 || logprobs.tokens.length > 0);
}
const said = ["", ""];
for await (const chunk of await client.completions.create({ ...ask, n: 2, stream: true }))
    for (const choice of chunk.choices) said[choice.index] += choice.text;
assert.equal(said[0], said[1]); // greedy
const judged = await client.chat.completions.create({
    model, messages, max_tokens: 4, logprobs: true, top_logprobs: 3,
});
for (const token of judged.choices[0].logprobs.content) {
    assert.equal(token.top_logprobs.length, 3);
    assert(Array.isArray(token.bytes) && token.logprob <= 0);
}

// Embeddings: the client asks for base64 by itself, and decodes it.
const embedded = await client.embeddings.create({ model, input: ["a node", "a shoal"] });
assert.equal(embedded.data.length, 2);
const plain = await client.embeddings.create({ model, input: "a node", encoding_format: "float" });
assert.equal(plain.data[0].embedding.length, embedded.data[0].embedding.length);
plain.data[0].embedding.forEach((x, i) => assert(Math.abs(x - embedded.data[0].embedding[i]) < 1e-4));
assert(Math.abs(plain.data[0].embedding.reduce((sum, x) => sum + x * x, 0) - 1) < 1e-3);
assert(embedded.usage.prompt_tokens > 0);

// Errors come as the client's own classes.
await refused(client.completions.create({ ...ask, model: "gpt-4o" }), 404, "model_not_found");
await refused(client.completions.create({ ...ask, n: 9 }), 400);
await refused(client.completions.create({ ...ask, echo: true }), 400);
await refused(client.embeddings.create({ model, input: "" }), 400);
await refused(client.completions.create({ ...ask, max_tokens: 0 }), 400);
await refused(client.completions.create({ ...ask, prompt: "word ".repeat(20000) }), 400,
    "context_length_exceeded");

// Feedback is no part of OpenAI's API; the client posts it all the same.
const rate = (body) => client.post("/feedback", { body });
const rated = await rate({ id: whole.id, action: "edit", text: " there was a node" });
assert.equal(rated.object, "feedback");
await rate({ id: whole.id, action: "edit", text: " there was a node" }); // the same again
await refused(rate({ id: whole.id, action: "reject" }), 409, "already_rated");
await refused(rate({ id: "cmpl-ffffffffffffffff", action: "accept" }), 404, "completion_not_found");
await refused(rate({ id: chat.id, action: "edit" }), 400);
await rate({ id: chat.id, action: "accept" });

console.log("ok");
