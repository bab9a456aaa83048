// Requests to the server: keys, errors and server-sent events.

const KEY = "masquerade-key"; // in sessionStorage, which ends with the tab

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** An error response, or a lost connection (`status` 0). */
export class Failure extends Error {
  constructor(message, { status = 0, code = null, param = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

const LOST = "The connection to the server was lost.";
const lose = () => {
  throw new Failure(LOST);
};

/** Send a request; returns the response's JSON and entity tag, or throws a `Failure`. */
export async function ask(method, path, body, headers = {}) {
  const response = await send(method, path, body, headers);
  return Object.assign(await read(response), { etag: response.headers.get("ETag") });
}

/** Download a path to a file of this name. A plain link could not send the key. */
export async function download(path, name) {
  const response = await send("GET", path);
  const url = URL.createObjectURL(await response.blob().catch(lose));
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** Yield the parsed events of a stream up to `[DONE]`. An earlier end and an error event throw a `Failure`. */
export async function* listen(method, path, body, signal) {
  const response = await send(method, path, body, {}, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read().catch((error) => {
        throw signal?.aborted ? error : new Failure(LOST);
      });
      if (done) throw new Failure(LOST);
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue; // a comment keeps the connection alive
        if (event === "data: [DONE]") return;
        const data = JSON.parse(event.slice(6));
        if (data.error) throw new Failure(data.error.message, data.error);
        yield data;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Upload a form with files; `progress` gets the share that has been sent. */
export function upload(path, form, progress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not report upload progress
    const shown = key.get();
    request.open("POST", path);
    if (shown) request.setRequestHeader("Authorization", `Bearer ${shown}`);
    request.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
    request.onerror = () => reject(new Failure(LOST));
    request.onload = () => {
      const response = new Response(request.responseText, { status: request.status });
      (response.ok ? read(response) : refuse(response, shown)).then(resolve, reject);
    };
    request.send(form);
  });
}

async function send(method, path, body, headers, signal) {
  const given = { ...headers };
  const shown = key.get();
  if (shown) given.Authorization = `Bearer ${shown}`;
  if (body !== undefined) given["Content-Type"] = "application/json";
  const options = { method, headers: given, signal, body: body === undefined ? undefined : JSON.stringify(body) };
  const response = await fetch(path, options).catch((error) => {
    throw signal?.aborted ? error : new Failure(LOST);
  });
  return response.ok ? response : refuse(response, shown);
}

async function read(response) {
  try {
    return await response.json();
  } catch {
    throw new Failure(LOST, { status: response.status });
  }
}

/** Throw the `Failure` of an error response. If the key is invalid, ask for another, unless it has changed meanwhile. */
async function refuse(response, shown) {
  const { error } = await read(response);
  const failure = new Failure(error?.message ?? `The server said ${response.status}.`, { ...error, status: response.status });
  if (response.status === 401 && shown === key.get()) document.dispatchEvent(new CustomEvent("key-wanted", { detail: failure.message }));
  throw failure;
}
