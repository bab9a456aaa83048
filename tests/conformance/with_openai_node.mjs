// The stock openai SDK for JavaScript.

import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";
import { MAX_TOKENS, OVERSIZE, PERSON, QUESTION, TOO_LONG, WEATHER, world } from "./checks.mjs";
import { check, collect, refused, run } from "./checks.mjs";

const MODEL = world.model;
const PLAIN = { messages: QUESTION, temperature: 0, max_completion_tokens: MAX_TOKENS };
const CITIES = ["Bonn", "Aachen"];
const client = connect();

function connect({ key = world.admin, url = world.url, ...options } = {}) {
  return new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0, timeout: 120_000, ...options });
}

function chat(fields = {}, by = client) {
  return by.chat.completions.create({ model: MODEL, ...PLAIN, ...fields });
}

const textOf = (answer) => answer.choices[0].message.content;

check("models", async () => {
  const names = (await collect(client.models.list())).map((model) => model.id);
  assert(names.includes(MODEL) && names.includes(`${MODEL}:introvert`));
  assert.equal((await client.models.retrieve(`${MODEL}:introvert`)).id, `${MODEL}:introvert`);
});

check("chat", async () => {
  const answer = await chat({ max_completion_tokens: 40, seed: 1, stop: ["\n"], n: 2 });
  assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1]);
  assert(textOf(answer));
  assert(answer._request_id);
  const text = await client.completions.create({ model: MODEL, prompt: "On Sunday I like", max_tokens: 8 });
  assert(text.choices[0].text);
});

check("persona", async () => {
  const byModel = textOf(await chat({ model: `${MODEL}:introvert` }));
  const byField = textOf(await chat({ persona: "introvert" }));
  const byHeader = textOf(await chat({}, connect({ defaultHeaders: { "X-Persona": "introvert" } })));
  assert.deepEqual([byField, byHeader], [byModel, byModel]);
  assert.notEqual(textOf(await chat()), byModel);
});

check("stream", async () => {
  const [whole] = (await chat({ model: `${MODEL}:introvert` })).choices;
  const chunks = await collect(await chat({ model: `${MODEL}:introvert`, stream: true }));
  assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), whole.message.content);
  assert.equal(chunks.at(-1).choices[0].finish_reason, whole.finish_reason);
  const helper = client.chat.completions.stream({ model: `${MODEL}:introvert`, ...PLAIN });
  assert.equal(await helper.finalContent(), whole.message.content);
});

check("usage", async () => {
  const whole = (await chat()).usage;
  const chunks = await collect(await chat({ stream: true, stream_options: { include_usage: true } }));
  const { prompt_tokens, completion_tokens } = chunks.at(-1).usage;
  assert.deepEqual([prompt_tokens, completion_tokens], [whole.prompt_tokens, whole.completion_tokens]);
});

check("tools", async () => {
  const required = { tools: [WEATHER], tool_choice: "required", parallel_tool_calls: false };
  const { message } = (await chat(required)).choices[0];
  assert.equal(message.tool_calls.length, 1);
  const [call] = message.tool_calls;
  assert(CITIES.includes(JSON.parse(call.function.arguments).city));
  const streamed = await client.chat.completions
    .stream({ model: MODEL, ...PLAIN, ...required })
    .finalMessage();
  assert.equal(streamed.tool_calls[0].function.arguments, call.function.arguments);
  const told = { role: "tool", tool_call_id: call.id, content: "dry" };
  assert(textOf(await chat({ messages: [...QUESTION, message, told], tools: [WEATHER], tool_choice: "none" })));
});

check("json_schema", async () => {
  const form = { type: "json_schema", json_schema: { name: "person", schema: PERSON, strict: true } };
  const answer = await client.chat.completions.parse({
    model: MODEL,
    ...PLAIN,
    response_format: form,
  });
  assert(["calm", "wild"].includes(JSON.parse(textOf(answer)).mood));
});

check("logprobs", async () => {
  const answer = await chat({ logprobs: true, top_logprobs: 2, max_completion_tokens: 4 });
  const tokens = answer.choices[0].logprobs.content;
  assert(tokens.length > 0 && tokens.length <= 4);
  assert(tokens.every((token) => token.logprob <= 0 && token.top_logprobs.length === 2));
});

check("responses", async () => {
  const plain = { model: `${MODEL}:introvert`, input: QUESTION, temperature: 0, max_output_tokens: MAX_TOKENS };
  const response = await client.responses.create(plain);
  assert.equal(response.output_text, textOf(await chat({ model: `${MODEL}:introvert` })));
  const stream = client.responses.stream(plain);
  let text = "";
  stream.on("response.output_text.delta", (event) => (text += event.delta));
  assert.equal((await stream.finalResponse()).output_text, text);
  assert.equal(text, response.output_text);
  const tool = { type: "function", ...WEATHER.function };
  const { output } = await client.responses.create({
    ...plain,
    tools: [tool],
    tool_choice: "required",
    parallel_tool_calls: false,
  });
  assert(CITIES.includes(JSON.parse(output[0].arguments).city));
  const told = { type: "function_call_output", call_id: output[0].call_id, output: "dry" };
  assert((await client.responses.create({ ...plain, input: [...QUESTION, ...output, told] })).output_text);
  const format = { type: "json_schema", name: "person", schema: PERSON, strict: true };
  const person = await client.responses.parse({ ...plain, text: { format } });
  assert(["calm", "wild"].includes(JSON.parse(person.output_text).mood));
});

check("previous response", async () => {
  const plain = { model: `${MODEL}:introvert`, temperature: 0, max_output_tokens: MAX_TOKENS };
  const first = await client.responses.create({ ...plain, input: QUESTION });
  const second = await client.responses.create({ ...plain, input: "Why?", previous_response_id: first.id });
  const whole = [...QUESTION, ...first.output, { role: "user", content: "Why?" }];
  assert.equal(second.output_text, (await client.responses.create({ ...plain, input: whole })).output_text);
  assert.equal((await collect(client.responses.inputItems.list(second.id))).length, 3);
  assert.equal((await client.responses.retrieve(second.id)).output_text, second.output_text);
  await client.responses.delete(second.id);
  const error = await refused(() => client.responses.retrieve(second.id), OpenAI.NotFoundError);
  assert.equal(error.code, "response_not_found");
});

check("files", async () => {
  const content = '{"text": "hello"}';
  const notes = await toFile(Buffer.from(content), "notes.jsonl");
  const file = await client.files.create({ file: notes, purpose: "fine-tune" });
  assert.deepEqual([file.bytes, file.filename], [17, "notes.jsonl"]);
  assert((await collect(client.files.list())).some((one) => one.id === file.id));
  assert.equal(await (await client.files.content(file.id)).text(), content);
  assert((await client.files.delete(file.id)).deleted);
});

check("list builds", async () => {
  assert(Array.isArray(await collect(client.fineTuning.jobs.list())));
  const error = await refused(() => client.fineTuning.jobs.retrieve("ftjob-none"), OpenAI.NotFoundError);
  assert.equal(error.code, "job_not_found");
});

check("embeddings", async () => {
  // The SDK asks for base64 and reads it.
  const { data } = await client.embeddings.create({ model: MODEL, input: ["calm", "wild"] });
  assert.deepEqual(data.map((one) => one.index), [0, 1]);
  assert(Math.abs(data[0].embedding.reduce((sum, value) => sum + value ** 2, 0) - 1) < 1e-3);
});

check("400", async () => {
  let error = await refused(() => chat({ chat_template: "x" }), OpenAI.BadRequestError);
  assert.deepEqual([error.code, error.param], ["unsupported_parameter", "chat_template"]);
  const long = [{ role: "user", content: TOO_LONG }];
  error = await refused(() => chat({ messages: long }), OpenAI.BadRequestError);
  assert.equal(error.code, "context_length_exceeded");
});

check("401", async () => {
  const error = await refused(() => chat({}, connect({ key: "sk-wrong" })), OpenAI.AuthenticationError);
  assert.deepEqual([error.code, error.type], ["invalid_api_key", "authentication_error"]);
  assert(error.requestID);
});

check("403", async () => {
  const limited = connect({ key: world.limited });
  const error = await refused(() => chat({ model: `${MODEL}:formal` }, limited), OpenAI.PermissionDeniedError);
  assert.equal(error.code, "persona_forbidden");
});

check("404", async () => {
  const error = await refused(() => chat({ model: `${MODEL}:pirate`, stream: true }), OpenAI.NotFoundError);
  assert.deepEqual([error.code, error.param], ["model_not_found", "model"]);
  assert.equal((await refused(() => chat({ persona: "pirate" }), OpenAI.NotFoundError)).code, "persona_not_found");
});

check("413", async () => {
  const error = await refused(() => chat({ messages: [{ role: "user", content: OVERSIZE }] }), OpenAI.APIError);
  assert.deepEqual([error.status, error.code], [413, "body_too_large"]);
});

check("422 as 400", async () => {
  const error = await refused(() => chat({ temperature: "hot" }), OpenAI.BadRequestError);
  assert.deepEqual([error.code, error.param], ["invalid_value", "temperature"]);
});

check("429", async () => {
  const hasty = connect({ key: world.hasty });
  await chat({ max_completion_tokens: 1 }, hasty);
  const error = await refused(() => chat({ max_completion_tokens: 1 }, hasty), OpenAI.RateLimitError);
  assert.equal(error.code, "rate_limited");
  assert(Number(error.headers.get("Retry-After")) <= 60);
});

check("503", async () => {
  const error = await refused(() => connect({ url: world.second }).files.list(), OpenAI.InternalServerError);
  assert.deepEqual([error.status, error.code], [503, "not_ready"]);
});

await run();
