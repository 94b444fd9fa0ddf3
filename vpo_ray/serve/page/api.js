// The endpoint's routes, as functions. All of them throw an Error whose message can be shown.

const at = (path) => new URL(path, document.baseURI);

async function call(path, key, body, signal) {
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const given = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  const reply = await fetch(at(path), { headers, signal, ...given });
  if (reply.ok) return reply;
  // A proxy in between has errors of its own kind.
  const answer = await reply.json().catch(() => null);
  const told = answer?.error?.message ?? (reply.statusText || "the endpoint cannot be reached");
  const wait = reply.headers.get("Retry-After");
  throw new Error(`${reply.status}: ${told}${wait ? ` (again in ${wait} s)` : ""}`);
}

// Server-sent events of a POST: EventSource can only GET.
async function* events(reply) {
  let text = "";
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const [, name, data] = /^event: (.*)\ndata: (.*)$/s.exec(part);
      yield [name, JSON.parse(data)];
    }
  }
}

// The answer to a query; `written` gets the prompt in pieces where the endpoint sends it so.
export async function optimised(request, key, signal, written) {
  const reply = await call("v1/optimize", key, { ...request, stream: true }, signal);
  let result = null;
  for await (const [name, data] of events(reply)) {
    if (name === "prompt") written(data.delta);
    else if (name === "result") result = data;
    else throw new Error(data.error?.message ?? "the endpoint failed");
  }
  if (result === null) throw new Error("the answer broke off; try again");
  return result;
}

export async function say(id, opinion, key) {
  await call("v1/feedback", key, { id, ...opinion });
}

// A file as a data: URI.
export function uriOf(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

// The URL of the video of a prompt as it is. Videos of one query and seed begin with the same noise.
export async function filmed(asked, key, signal, told) {
  const states = { queued: "in the queue…", in_progress: "rendering…" };
  let job = await (await call("v1/videos", key, asked, signal)).json();
  while (job.status in states) {
    told(states[job.status]);
    await new Promise((wake) => setTimeout(wake, 1000));
    job = await (await call(`v1/videos/${job.id}`, key, undefined, signal)).json();
  }
  if (job.status !== "completed") throw new Error(job.error?.message ?? job.status);
  const reply = await call(`v1/videos/${job.id}/content`, key, undefined, signal);
  told(typeof job.video.score === "number" ? `score ${job.video.score.toFixed(2)}` : "");
  return URL.createObjectURL(await reply.blob());
}
