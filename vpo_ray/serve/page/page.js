// The playground: asks /v1/optimize, shows the prompt as it comes, then what the endpoint says of it.
// Text only ever enters the page as text nodes.
"use strict";

const $ = (id) => document.getElementById(id);
const at = (path) => new URL(path, document.baseURI);
let last = null;
let answerId = null;

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function element(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function busy(text) {
  $("status").textContent = text;
  $("go").disabled = $("film").disabled = Boolean(text);
}

async function refusal(reply) {
  const told = await reply.json().then((body) => body.error.message, () => reply.statusText);
  const wait = reply.headers.get("Retry-After");
  return new Error(`${reply.status}: ${told}${wait ? ` (again in ${wait} s)` : ""}`);
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

// The words of two texts in one row, by their longest common subsequence: kept, removed, added.
function difference(before, after) {
  const [a, b] = [before, after].map((text) => text.match(/\S+\s*/g) || []);
  const same = (x, y) => x.trim().toLowerCase() === y.trim().toLowerCase();
  const longest = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      longest[i][j] = same(a[i], b[j]) ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
  const row = [];
  const put = (tag, word) => {
    if (row.length && row.at(-1)[0] === tag) row.at(-1)[1] += word;
    else row.push([tag, word]);
  };
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && same(a[i], b[j])) { put("span", b[j]); i++; j++; }
    else if (j >= b.length || (i < a.length && longest[i + 1][j] >= longest[i][j + 1])) put("del", a[i++]);
    else put("ins", b[j++]);
  }
  return row;
}

// What a user says of the answer that is shown.
async function say(opinion) {
  problem("");
  try {
    const body = JSON.stringify({ id: answerId, ...opinion });
    const reply = await fetch(at("v1/feedback"), { method: "POST", headers: headers(), body });
    if (!reply.ok) throw await refusal(reply);
    $("thanks").textContent = "Thank you.";
  } catch (error) {
    problem(error.message);
  }
}

function show(query, result) {
  last = result.prompt === null ? null : { query };
  answerId = result.id;
  $("opinion").hidden = answerId === null;
  $("edited").value = result.prompt ?? "";
  $("prompt").textContent = result.prompt ?? "No prompt: the query was refused.";
  const safety = result.safety;
  $("safety").dataset.outcome = safety.outcome;
  $("safety").textContent = safety.checked.length
    ? `Safety: ${safety.outcome}${safety.reason ? ` — ${safety.reason}` : ""}`
    : "Safety: not checked here";
  const facts = [`${result.latency.total.toFixed(2)} s`];
  if (result.usage.completion_tokens) facts.push(`${result.usage.completion_tokens} tokens`);
  if (result.fallback) facts.push("the optimiser failed: this is your own query");
  const flags = result.flags.map((flag) => `${flag.name} ${flag.value}`.trim());
  if (flags.length) facts.push(`flags: ${flags.join(", ")}`);
  $("facts").textContent = facts.join(" · ");
  $("diff").replaceChildren(...difference(query, result.prompt ?? "").map(([tag, text]) => element(tag, text)));
  $("changes").hidden = result.prompt === null;
  $("alternatives").replaceChildren(...result.alternatives.map((text) => element("li", text)));
  $("others").hidden = !result.alternatives.length;
  const ranking = result.ranking ?? [];
  $("ranking").replaceChildren(
    ...ranking.map((r) => element("li", `${r.score}: ${r.prompt}${r.reason ? `\n${r.reason}` : ""}`)),
  );
  $("reasons").hidden = !ranking.length;
  $("copy").hidden = result.prompt === null;
}

async function optimise() {
  const query = $("query").value;
  problem("");
  busy("writing…");
  try {
    const seed = $("seed").value;
    const body = { query, n: 1 + Number($("n").value), stream: true, ...(seed ? { seed: Number(seed) } : {}) };
    const reply = await fetch(at("v1/optimize"), { method: "POST", headers: headers(), body: JSON.stringify(body) });
    if (!reply.ok) throw await refusal(reply);
    for (const id of ["changes", "others", "reasons", "video", "copy", "opinion"]) $(id).hidden = true;
    for (const id of ["prompt", "safety", "facts", "thanks"]) $(id).textContent = "";
    $("answer").hidden = false;
    for await (const [name, data] of events(reply)) {
      if (name === "prompt") $("prompt").append(data.delta);
      else if (name === "result") show(query, data);
      else throw new Error(data.error.message);
    }
  } catch (error) {
    problem(error.message);
  } finally {
    busy("");
  }
}

async function film() {
  if (!last) return;
  problem("");
  busy("in the queue…");
  try {
    let reply = await fetch(at("v1/videos"), { method: "POST", headers: headers(), body: JSON.stringify(last) });
    if (!reply.ok) throw await refusal(reply);
    let job = await reply.json();
    while (job.status === "queued" || job.status === "in_progress") {
      await new Promise((wake) => setTimeout(wake, 1000));
      reply = await fetch(at(`v1/videos/${job.id}`), { headers: headers() });
      if (!reply.ok) throw await refusal(reply);
      job = await reply.json();
      busy(job.status === "in_progress" ? "rendering…" : "in the queue…");
    }
    if (job.status !== "completed") throw new Error(job.error?.message ?? job.status);
    reply = await fetch(at(`v1/videos/${job.id}/content`), { headers: headers() });
    if (!reply.ok) throw await refusal(reply);
    $("video").src = URL.createObjectURL(await reply.blob());
    $("video").hidden = false;
  } catch (error) {
    problem(error.message);
  } finally {
    busy("");
  }
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); optimise(); });
$("query").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("film").addEventListener("click", film);
$("copy").addEventListener("click", () => navigator.clipboard?.writeText($("prompt").textContent));
$("up").addEventListener("click", () => say({ rating: "up" }));
$("down").addEventListener("click", () => say({ rating: "down" }));
$("send").addEventListener("click", () => say({ edited: $("edited").value }));
const facts = document.documentElement.dataset;
$("notice").textContent = facts.notice ?? "";
$("notice").hidden = !facts.notice;
$("film").hidden = facts.videos !== "True";
$("key").closest("label").hidden = facts.keys !== "True";
$("n").max = Number(facts.maxN) - 1;
