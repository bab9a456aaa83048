// What checks.py is, for clients in JavaScript: `check(name, function)` names a check, `run()` does all of them.

export const world = JSON.parse(process.argv[2]);
export const {
  question: QUESTION,
  person: PERSON,
  weather: WEATHER,
  too_long: TOO_LONG,
  max_tokens: MAX_TOKENS,
} = world.examples;
export const OVERSIZE = "x".repeat(9 * 2 ** 20); // no body may be so large

const checks = new Map();

export function check(name, work) {
  if (checks.has(name)) throw new Error(`two checks are named ${name}`);
  checks.set(name, work);
}

// The error that asking throws, which must be of a class.
export async function refused(ask, kind) {
  let answer;
  try {
    answer = await ask();
  } catch (error) {
    if (error instanceof kind) return error;
    throw error;
  }
  throw new Error(`this was answered: ${JSON.stringify(answer)?.slice(0, 200)}`);
}

export async function collect(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

// One JSON object a line on stdout, as checks.py writes it.
export async function run() {
  for (const [name, work] of checks) {
    let error = null;
    try {
      await work();
    } catch (failure) {
      console.error(failure);
      error = String(failure);
    }
    process.stdout.write(`${JSON.stringify({ check: name, error }).replace('{"check":', '{"check": ')}\n`);
  }
}
