// Checks of a file before its upload: number and kinds of lines, and the first invalid lines.
// The server repeats them in full.

const REPORTED = 20;
const KINDS = {
  messages: { name: "chat", check: checkMessages },
  prompt: { name: "prompt and completion", check: (line) => checkTexts(line, "prompt", "completion") },
  question: {
    name: "question with both answers",
    check: (line) => checkTexts(line, "question", "answer_matching_behavior", "answer_not_matching_behavior"),
  },
  text: { name: "text", check: (line) => checkTexts(line, "text") },
};

/** `{lines, kinds: Map(name -> count), faults: [[line number, what is wrong]], more}` of a file of examples. */
export const inspect = (file) => look(file, judge);

/** The same for a file of questions, whose answers are ignored. */
export const inspectQuestions = (file) => look(file, judgeQuestion);

/** The same for a character card, as far as it can be checked here; its only line is number 1. */
export async function inspectCard(file) {
  const found = { lines: 1, kinds: new Map(), faults: [], more: 0 };
  if (file.type === "image/png") return found; // the server reads the PNG's text
  try {
    const card = JSON.parse(await file.text());
    const { name } = card.data ?? card;
    if (isText(name)) found.kinds.set(`card of ${name}`, 1);
    else found.faults.push([1, "no character card: it has no `name`"]);
  } catch (error) {
    found.faults.push([1, `neither a PNG nor JSON: ${error.message}`]);
  }
  return found;
}

async function look(file, judge) {
  const found = { lines: 0, kinds: new Map(), faults: [], more: 0 };
  let number = 0;
  try {
    for await (const line of linesOf(file)) {
      number += 1;
      if (!line.trim()) continue;
      found.lines += 1;
      const [kind, fault] = judge(line);
      if (kind) found.kinds.set(kind, (found.kinds.get(kind) ?? 0) + 1);
      if (fault && found.faults.length < REPORTED) found.faults.push([number, fault]);
      else if (fault) found.more += 1;
    }
  } catch (error) {
    found.faults.push([number + 1, error instanceof TypeError ? "not UTF-8 text" : error.message]);
  }
  if (!found.lines && !found.faults.length) found.faults.push([1, "the file is empty; it needs one JSON object a line"]);
  return found;
}

async function* linesOf(file) {
  let rest = "";
  for await (const piece of pieces(file.stream().pipeThrough(new TextDecoderStream("utf-8", { fatal: true })))) {
    const lines = (rest + piece).split("\n");
    rest = lines.pop();
    yield* lines;
  }
  if (rest) yield rest;
}

async function* pieces(stream) {
  const reader = stream.getReader();
  for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) yield value;
}

function judge(line) {
  const [fields, fault] = parse(line);
  if (fault) return [null, fault];
  const key = Object.keys(KINDS).find((name) => name in fields);
  if (!key) return [null, `has none of the fields ${Object.keys(KINDS).join(", ")}`];
  return [KINDS[key].name, KINDS[key].check(fields)];
}

function judgeQuestion(line) {
  const [fields, fault] = parse(line);
  if (fault) return [null, fault];
  const asks = isText(fields.prompt) || isText(fields.question) || (Array.isArray(fields.messages) && fields.messages.length > 0);
  return asks ? ["question", null] : [null, "a question needs `prompt`, `question` or `messages`"];
}

/** `[fields, null]` or `[null, fault]` */
function parse(line) {
  let fields;
  try {
    fields = JSON.parse(line);
  } catch (error) {
    return [null, `not JSON: ${error.message}`];
  }
  if (fields === null || typeof fields !== "object" || Array.isArray(fields)) return [null, "must be a JSON object"];
  return [fields, null];
}

function checkMessages({ messages }) {
  if (!Array.isArray(messages) || messages.length < 2) return "`messages` must be a list of a question and an answer at least";
  const strange = messages.findIndex((one) => !["system", "user", "assistant"].includes(one?.role) || !isText(one.content));
  if (strange >= 0) return `messages[${strange}] must have a role (system, user, assistant) and content`;
  return messages.at(-1).role === "assistant" ? null : "the last message must be the assistant's";
}

function checkTexts(fields, ...keys) {
  const missing = keys.find((key) => !isText(fields[key]));
  return missing ? `\`${missing}\` must be text, and not empty` : null;
}

const isText = (value) => typeof value === "string" && value.trim() !== "";
