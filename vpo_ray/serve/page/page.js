// The playground: a query in, the prompt beside it, and what can be done with it. Answers of the session are
// held in memory alone. Text only ever enters the page as text nodes.
import { filmed, optimised, say, uriOf } from "./api.js";
import { difference } from "./difference.js";
import { wishesOf } from "./wishes.js";

const $ = (id) => document.getElementById(id);
const endpoint = document.documentElement.dataset;
const films = endpoint.videos === "True";
// Whether the policy is shown a picture, and whether videos begin with it.
const sees = endpoint.sees === "True";
const animates = endpoint.animates === "True";
const MOST_ANSWERS = 50;

// Newest first: { query, picture, seed, result, texts, tab, films: Map of prompt to { url, told } }.
const answers = [];
let shown = null;
let running = null;

const key = () => $("key").value.trim();

function element(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}

function marked(rows) {
  // The space after a word is between marks, not in one.
  return rows.flatMap(([tag, text]) => [element(tag, text.trimEnd()), text.slice(text.trimEnd().length)]);
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

// One piece of work at a time, which Esc and Stop end.
async function working(text, work) {
  if (running) return;
  const mine = (running = new AbortController());
  problem("");
  ready(text);
  let end = "";
  try {
    await work(mine.signal);
  } catch (error) {
    if (mine.signal.aborted) end = "stopped";
    else problem(error.message);
  } finally {
    running = null;
    ready(end);
  }
}

function ready(text) {
  $("status").textContent = text;
  for (const id of ["go", "again", "film", "film-edited"]) $(id).disabled = running !== null;
  $("stop").hidden = running === null;
}

const wishes = () =>
  wishesOf([...document.querySelectorAll("[data-wish]")].map((field) =>
    [field.dataset.wish, field.dataset.kind, field.value]));

function countWishes() {
  const count = Object.keys(wishes()).length;
  $("wished").textContent = count ? `(${count})` : "";
}

function optimise(query) {
  if (!query.trim()) return;
  return working("writing…", async (signal) => {
    const seed = $("seed").value === "" ? null : Number($("seed").value);
    const [picture] = sees || animates ? $("image").files : [];
    const image = picture && sees ? { image: await uriOf(picture) } : {};
    const request = { query, ...image, n: 1 + Number($("n").value), ...(seed === null ? {} : { seed }), ...wishes() };
    let begun = false;
    const result = await optimised(request, key(), signal, (delta) => {
      if (!begun) begin(query);
      begun = true;
      $("prompt").append(delta);
    });
    const texts = [result.prompt, ...result.alternatives].filter((text) => text !== null);
    answers.unshift({ query, picture, seed, result, texts, tab: 0, films: new Map() });
    answers.splice(MOST_ANSWERS).forEach(forget);
    show(answers[0]);
  });
}

// An answer that is being written.
function begin(query) {
  shown = null;
  for (const id of ["tabs", "legend", "actions", "editor", "opinion", "films", "reasons"]) $(id).hidden = true;
  for (const id of ["prompt", "safety", "facts"]) $(id).textContent = "";
  $("prompt-title").textContent = "Prompt";
  $("original").textContent = query;
  $("answer").hidden = false;
  list();
}

function forget(answer) {
  for (const { url } of answer.films.values()) if (url) URL.revokeObjectURL(url);
}

function show(answer) {
  shown = answer;
  $("answer").hidden = false;
  for (const id of ["thanks", "copied"]) $(id).textContent = "";
  $("comment").value = "";
  const { result, texts } = answer;
  $("tabs").hidden = texts.length < 2;
  $("tabs").replaceChildren(...texts.map((_, index) => tab(index)));
  const { safety } = result;
  $("safety").dataset.outcome = safety.outcome;
  $("safety").textContent = safety.checked.length
    ? `Safety: ${safety.outcome}${safety.reason ? ` — ${safety.reason}` : ""}`
    : "Safety: not checked here";
  $("facts").textContent = facts(answer).join(" · ");
  const ranking = result.ranking ?? [];
  $("ranking").replaceChildren(
    ...ranking.map((rank) => element("li", `${rank.score}: ${rank.prompt}${rank.reason ? `\n${rank.reason}` : ""}`)),
  );
  $("reasons").hidden = !ranking.length;
  select(answer.tab);
  list();
}

function facts({ result, picture }) {
  const told = [`${result.latency.total.toFixed(2)} s`];
  if (picture) told.push(`with ${picture.name}`);
  if (result.usage.completion_tokens) told.push(`${result.usage.completion_tokens} tokens`);
  if (result.fallback) told.push("the optimiser failed: this is your own query");
  if (result.skipped) told.push("left as it is");
  if (result.unmet.length) told.push(`not met: ${result.unmet.join(", ")}`);
  const flags = result.flags.map((flag) => `${flag.name} ${flag.value}`.trim());
  if (flags.length) told.push(`flags: ${flags.join(", ")}`);
  if (result.system_fingerprint) told.push(result.system_fingerprint);
  return told;
}

const named = (index) => (index ? `Alternative ${index}` : "Prompt");

function tab(index) {
  const button = element("button", named(index));
  button.type = "button";
  button.id = `tab-${index}`;
  button.setAttribute("role", "tab");
  button.setAttribute("aria-controls", "panel");
  button.addEventListener("click", () => select(index));
  return button;
}

// Show one of the answer's texts beside the query.
function select(index) {
  shown.tab = index;
  const { query, result, texts } = shown;
  const text = texts[index];
  for (const [at, button] of [...$("tabs").children].entries()) {
    button.setAttribute("aria-selected", at === index);
    button.tabIndex = at === index ? 0 : -1;
  }
  $("prompt-title").textContent = named(index);
  const [before, after] = text === undefined ? [[["span", query]], []] : difference(query, text);
  $("original").replaceChildren(...marked(before));
  $("prompt").replaceChildren(...marked(after));
  if (text === undefined) $("prompt").textContent = "No prompt: the query was refused.";
  $("legend").hidden = $("actions").hidden = text === undefined;
  if (text === undefined) open(false);
  $("edited").value = text ?? "";
  $("send").hidden = $("opinion").hidden = result.id === null;
  // A thumb is about the prompt; among alternatives there is a choice.
  $("up").hidden = $("down").hidden = index > 0;
  $("choose").hidden = texts.length < 2;
  showFilms(text);
}

function open(wanted) {
  $("editor").hidden = !wanted;
  $("edit").setAttribute("aria-expanded", wanted);
}

function move(event) {
  const count = shown?.texts.length ?? 0;
  const { tab: at } = shown ?? {};
  const next = { ArrowRight: at + 1, ArrowLeft: at - 1 + count, Home: 0, End: count - 1 }[event.key];
  if (next === undefined || !count) return;
  event.preventDefault();
  select(next % count);
  $(`tab-${shown.tab}`).focus();
}

// The answers of the session, to go back to.
function list() {
  $("session").hidden = !answers.length;
  $("history").replaceChildren(...answers.map((answer) => {
    const button = element("button", answer.query);
    button.type = "button";
    button.dir = "auto";
    if (answer === shown) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => {
      if (running) return;
      $("query").value = answer.query;
      problem("");
      open(false);
      show(answer);
    });
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
}

function clear() {
  if (running) return;
  answers.splice(0).forEach(forget);
  shown = null;
  $("answer").hidden = true;
  problem("");
  list();
  $("query").focus();
}

// What a user says of the answer that is shown.
async function tell(opinion) {
  problem("");
  $("thanks").textContent = "";
  try {
    await say(shown.result.id, opinion, key());
    $("thanks").textContent = "Thank you.";
  } catch (error) {
    problem(error.message);
  }
}

// The videos of the query and of a prompt, both as they are.
function film(prompt) {
  const answer = shown;
  return working("making videos…", async (signal) => {
    const make = async (text) => {
      if (answer.films.get(text)?.url) return;
      const told = (status) => {
        answer.films.set(text, { ...answer.films.get(text), told: status });
        if (shown === answer) showFilms(prompt);
      };
      try {
        told("in the queue…");
        const image = answer.picture && animates ? { image: await uriOf(answer.picture) } : {};
        const asked = { query: answer.query, prompt: text, ...image, seed: answer.seed ?? 0 };
        const url = await filmed(asked, key(), signal, told);
        answer.films.get(text).url = url;
        if (shown === answer) showFilms(prompt);
      } catch (error) {
        told("");
        throw error;
      }
    };
    const made = await Promise.allSettled([...new Set([answer.query, prompt])].map(make));
    const failed = made.find(({ status }) => status === "rejected");
    if (failed) throw failed.reason;
  });
}

function showFilms(prompt) {
  const [raw, other] = [shown.films.get(shown.query), shown.films.get(prompt)];
  $("films").hidden = !(raw?.url || raw?.told || other?.url || other?.told);
  $("film-name").textContent = shown.texts.includes(prompt) ? named(shown.texts.indexOf(prompt)) : "Your version";
  for (const [name, made] of [["raw", raw], ["film", other]]) {
    const video = $(`${name}-video`);
    $(`${name}-status`).textContent = made?.told ?? "not made yet";
    video.hidden = !made?.url;
    if (made?.url && video.src !== made.url) video.src = made.url;
    if (!made?.url) video.removeAttribute("src");
  }
}

// Both videos play, stop and wind together.
function together(one, other) {
  one.addEventListener("play", () => other.src && other.play());
  one.addEventListener("pause", () => other.pause());
  one.addEventListener("seeked", () => {
    if (Math.abs(one.currentTime - other.currentTime) > 0.2) other.currentTime = one.currentTime;
  });
}

async function copy() {
  const text = $("editor").hidden ? shown.texts[shown.tab] : $("edited").value;
  try {
    await navigator.clipboard.writeText(text);
    $("copied").textContent = "Copied.";
  } catch {
    // Without a secure origin there is no clipboard: the text is selected, for the browser's own copying.
    getSelection().selectAllChildren($("prompt"));
    $("copied").textContent = "Selected: copy it with your browser.";
  }
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); optimise($("query").value); });
$("query").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea");
  if (event.key === "Escape") running?.abort();
  else if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    $("query").focus();
  }
});
for (const example of $("examples").children)
  example.addEventListener("click", () => {
    $("query").value = example.textContent;
    // Without its key the endpoint would refuse: then the query waits for it.
    if (endpoint.keys === "True" && !key()) $("key").focus();
    else optimise(example.textContent);
  });
$("stop").addEventListener("click", () => running?.abort());
$("tabs").addEventListener("keydown", move);
$("copy").addEventListener("click", copy);
$("edit").addEventListener("click", () => {
  open($("editor").hidden);
  if (!$("editor").hidden) $("edited").focus();
});
$("again").addEventListener("click", () => {
  $("query").value = $("edited").value;
  optimise($("edited").value);
});
$("film").addEventListener("click", () => film(shown.texts[shown.tab]));
$("film-edited").addEventListener("click", () => { if ($("edited").value.trim()) film($("edited").value); });
$("up").addEventListener("click", () => tell({ rating: "up" }));
$("down").addEventListener("click", () => tell({ rating: "down" }));
$("choose").addEventListener("click", () => tell({ chosen: shown.tab }));
$("tell").addEventListener("click", () => { if ($("comment").value.trim()) tell({ comment: $("comment").value }); });
$("send").addEventListener("click", () => { if ($("edited").value.trim()) tell({ edited: $("edited").value }); });
$("clear").addEventListener("click", clear);
together($("raw-video"), $("film-video"));
together($("film-video"), $("raw-video"));
$("notice").textContent = endpoint.notice ?? "";
$("notice").hidden = !endpoint.notice;
$("film").hidden = $("film-edited").hidden = !films;
$("picture").hidden = !(sees || animates);
$("key").closest("label").hidden = endpoint.keys !== "True";
$("n").max = Number(endpoint.maxN) - 1;
$("effort").hidden = endpoint.ranks !== "True";
$("wishes").addEventListener("input", countWishes);
// A browser keeps what was typed when the page is loaded again, and cannot point at a wrong number that is folded in.
$("wishes").addEventListener("invalid", () => { $("wishes").open = true; }, true);
countWishes();
