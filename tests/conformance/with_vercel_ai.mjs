// Vercel's AI SDK: its provider for OpenAI, whose default is /v1/responses, and the one for compatible servers.

import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, embedMany, generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { MAX_TOKENS, OVERSIZE, QUESTION, TOO_LONG, check, collect, refused, run, world } from "./checks.mjs";

const MODEL = world.model;
const PERSONA = `${MODEL}:introvert`;
const PERSON = z.object({ mood: z.enum(["calm", "wild"]), age: z.number().int().min(1).max(99) });
const CITY = z.object({ city: z.enum(["Bonn", "Aachen"]) });
const KINDS = ["responses", "chat", "compatible"];
const ONE_CALL = { openai: { parallelToolCalls: false }, masquerade: { parallel_tool_calls: false } };

globalThis.AI_SDK_LOG_WARNINGS = false;

function connect({ key = world.admin, url = world.url } = {}) {
  const place = { baseURL: `${url}/v1`, apiKey: key };
  const openai = createOpenAI(place);
  const compatible = createOpenAICompatible({
    ...place,
    name: "masquerade",
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
  return { responses: openai, chat: openai.chat, compatible, openai };
}

const there = connect();

function plain(kind, { name = MODEL, by = there, ...fields } = {}) {
  const model = by[kind](name);
  return { model, messages: QUESTION, temperature: 0, maxOutputTokens: MAX_TOKENS, maxRetries: 0, ...fields };
}

const ask = (kind, fields) => generateText(plain(kind, fields));

// Errors of a stream are told to a callback, and do not stop the program.
const stream = (kind, fields) => streamText({ onError: () => {}, ...plain(kind, fields) });

async function fail(kind, fields) {
  const error = await refused(() => ask(kind, fields), APICallError);
  return { status: error.statusCode, retryable: error.isRetryable, ...JSON.parse(error.responseBody).error };
}

check("chat", async () => {
  for (const kind of KINDS) {
    const answer = await ask(kind, { system: "Be brief." });
    assert(answer.text);
    assert(["stop", "length"].includes(answer.finishReason), kind);
    assert(answer.response.id);
  }
  const { openai, compatible } = there;
  for (const model of [openai.completion(MODEL), compatible.completionModel(MODEL)]) {
    assert((await generateText({ model, prompt: "On Sunday I like", maxOutputTokens: 8, maxRetries: 0 })).text);
  }
});

check("persona", async () => {
  const texts = new Set();
  for (const kind of KINDS) {
    texts.add((await ask(kind, { name: PERSONA })).text);
    texts.add((await ask(kind, { headers: { "X-Persona": "introvert" } })).text);
  }
  texts.add((await ask("compatible", { providerOptions: { masquerade: { persona: "introvert" } } })).text);
  assert.equal(texts.size, 1);
  for (const kind of KINDS) assert(!texts.has((await ask(kind)).text), kind);
});

check("stream", async () => {
  for (const kind of KINDS) {
    const whole = await ask(kind, { name: PERSONA });
    const streamed = stream(kind, { name: PERSONA });
    assert.equal((await collect(streamed.textStream)).join(""), whole.text, kind);
    assert.equal(await streamed.finishReason, whole.finishReason, kind);
  }
});

check("usage", async () => {
  const found = new Set();
  for (const kind of KINDS) {
    const streamed = stream(kind);
    await streamed.consumeStream();
    for (const usage of [(await ask(kind)).usage, await streamed.usage]) {
      found.add(`${usage.inputTokens} ${usage.outputTokens} ${usage.totalTokens}`);
    }
  }
  assert.equal(found.size, 1, [...found].join("; "));
});

check("tools", async () => {
  for (const kind of KINDS) {
    const asked = [];
    const weather = tool({
      description: "The weather of a city.",
      inputSchema: CITY,
      execute: ({ city }) => {
        asked.push(city);
        return "dry";
      },
    });
    const required = { toolChoice: "required", maxOutputTokens: 60, providerOptions: ONE_CALL };
    const choose = ({ stepNumber }) => (stepNumber ? { toolChoice: "none" } : {});
    const steps = { stopWhen: stepCountIs(2), prepareStep: choose };
    const answer = await ask(kind, { ...required, ...steps, tools: { weather } });
    assert.equal(answer.steps.length, 2, kind);
    assert.deepEqual(answer.steps[0].toolCalls.map((call) => call.input.city), asked);
    assert(answer.text, kind);
    const unused = { weather: tool({ inputSchema: CITY }) };
    const streamed = stream(kind, { ...required, tools: unused });
    const [call] = await streamed.toolCalls;
    assert(CITY.safeParse(call.input).success, kind);
  }
});

check("json_schema", async () => {
  for (const kind of KINDS) {
    const { object } = await generateObject(plain(kind, { schema: PERSON }));
    assert.deepEqual((await ask(kind, { output: Output.object({ schema: PERSON }) })).output, object);
    const streamed = stream(kind, { output: Output.object({ schema: PERSON }) });
    assert.deepEqual((await collect(streamed.partialOutputStream)).at(-1), object);
  }
});

check("previous response", async () => {
  const first = await ask("responses", { name: PERSONA });
  const why = [{ role: "user", content: "Why?" }];
  const previousResponseId = first.providerMetadata.openai.responseId;
  const byId = await ask("responses", {
    name: PERSONA,
    messages: why,
    providerOptions: { openai: { previousResponseId } },
  });
  const messages = [...QUESTION, ...first.response.messages, ...why]; // the answer is an `item_reference`
  const byItems = await ask("responses", { name: PERSONA, messages });
  assert.equal(byId.text, byItems.text);
  assert.equal(byId.usage.inputTokens, byItems.usage.inputTokens);
});

check("logprobs", async () => {
  const options = { providerOptions: { openai: { logprobs: 2 } }, maxOutputTokens: 16 };
  for (const kind of ["responses", "chat"]) {
    const { providerMetadata } = await ask(kind, options);
    const tokens = providerMetadata.openai.logprobs.flat();
    assert(tokens.length > 0 && tokens.length <= 16, kind);
    assert(tokens.every((token) => token.logprob <= 0 && token.top_logprobs.length === 2), kind);
  }
});

check("embeddings", async () => {
  const { openai, compatible } = there;
  const values = ["calm", "wild"];
  const found = [];
  for (const model of [openai.embedding(MODEL), compatible.embeddingModel(MODEL)]) {
    const { embeddings, usage } = await embedMany({ model, values, maxRetries: 0 });
    assert.equal(embeddings.length, 2);
    assert(usage.tokens > 0);
    found.push(embeddings);
  }
  assert.deepEqual(found[0], found[1]);
});

check("400", async () => {
  for (const kind of KINDS) {
    const error = await fail(kind, { messages: [{ role: "user", content: TOO_LONG }] });
    assert.deepEqual([error.status, error.code, error.retryable], [400, "context_length_exceeded", false]);
  }
});

check("401", async () => {
  for (const kind of KINDS) {
    const error = await fail(kind, { by: connect({ key: "sk-wrong" }) });
    assert.deepEqual([error.status, error.code], [401, "invalid_api_key"]);
  }
});

check("403", async () => {
  for (const kind of KINDS) {
    const error = await fail(kind, { name: `${MODEL}:formal`, by: connect({ key: world.limited }) });
    assert.deepEqual([error.status, error.code], [403, "persona_forbidden"]);
  }
});

check("404", async () => {
  for (const kind of KINDS) {
    const error = await fail(kind, { name: `${MODEL}:pirate` });
    assert.deepEqual([error.status, error.code, error.retryable], [404, "model_not_found", false]);
    const parts = await collect(stream(kind, { name: `${MODEL}:pirate` }).fullStream);
    assert.equal(parts.find((part) => part.type === "error").error.statusCode, 404, kind);
  }
});

check("413", async () => {
  for (const kind of KINDS) {
    const error = await fail(kind, { messages: [{ role: "user", content: OVERSIZE }] });
    assert.deepEqual([error.status, error.code], [413, "body_too_large"]);
  }
});

check("422 as 400", async () => {
  for (const kind of KINDS) {
    const error = await fail(kind, { topP: 7 });
    assert.deepEqual([error.status, error.code, error.param], [400, "invalid_value", "top_p"]);
  }
});

check("429", async () => {
  const hasty = { by: connect({ key: world.hasty }), maxOutputTokens: 1 };
  await ask("chat", hasty);
  const error = await fail("chat", hasty);
  assert.deepEqual([error.status, error.code, error.retryable], [429, "rate_limited", true]);
});

await run();
