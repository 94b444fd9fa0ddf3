// Blind pairs: shows one, takes a vote, goes on. Votes stay in this browser until they are downloaded.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const memory = new Map(); // where the browser denies storage, as some do for a page from a file
const key = `vpo-compare-${data.page}`;
let rater = "", votes = new Map(), place = 0, loaded = 0;

function read(name) {
  try { return localStorage.getItem(name) ?? memory.get(name); } catch { return memory.get(name); }
}

function write(name, value) {
  memory.set(name, value);
  try { localStorage.setItem(name, value); } catch { at("lost").hidden = false; }
}

function enter(name) {
  rater = name.trim();
  votes = new Map(Object.entries(JSON.parse((rater && read(`${key}-${rater}`)) || "{}")));
  write(key, rater);
  place = open(0);
  show();
}

// The first pair from here on without a vote; after all of them if there is none.
function open(from) {
  const found = data.pairs.findIndex((pair, number) => number >= from && !votes.has(pair.id));
  return found < 0 ? data.pairs.length : found;
}

function vote(answer) {
  votes.set(data.pairs[place].id, answer);
  write(`${key}-${rater}`, JSON.stringify(Object.fromEntries(votes)));
  const next = open(place);
  place = next < data.pairs.length ? next : open(0);
  show();
}

function show() {
  const started = rater !== "", pair = data.pairs[place], left = data.pairs.length - votes.size;
  at("start").hidden = started;
  document.querySelector(".who").hidden = at("votes").hidden = at("bar").hidden = !started;
  at("ask").hidden = !started || !pair;
  at("done").hidden = !started || Boolean(pair);
  at("name").textContent = rater;
  at("progress").value = votes.size;
  at("download").textContent = `Download votes (${votes.size})`;
  at("said").textContent = "";
  at("text").hidden = true;
  at("end").textContent = left ? `${left} without a vote` : "Every pair has a vote. Thank you!";
  for (const button of document.querySelectorAll(".vote")) {
    button.disabled = !pair;
    button.setAttribute("aria-pressed", String(pair !== undefined && votes.get(pair.id) === button.dataset.vote));
  }
  loaded = 0;
  at("broken").hidden = true;
  at("place").textContent = `${place + 1} of ${data.pairs.length}`;
  at("query").textContent = pair?.query ?? "";
  for (const side of ["left", "right"]) {
    if (data.what === "prompt") at(side).textContent = pair?.[side] ?? "";
    else if (started && pair) at(side).src = pair[side];
    else at(side).removeAttribute("src");
    at(side).scrollTop = 0;
  }
}

function replay() {
  for (const video of document.querySelectorAll("video")) { video.currentTime = 0; video.play().catch(() => {}); }
}

function move(step) {
  place = Math.max(0, Math.min(data.pairs.length, place + step));
  show();
}

const text = () => JSON.stringify({
  page: data.page,
  rater,
  votes: data.pairs.filter((pair) => votes.has(pair.id)).map((pair) => ({ pair: pair.id, vote: votes.get(pair.id) })),
}, null, 1);

at("start").addEventListener("submit", (event) => { event.preventDefault(); enter(at("rater").value); });
at("leave").addEventListener("click", () => enter(""));
at("back").addEventListener("click", () => move(-1));
at("skip").addEventListener("click", () => move(1));
for (const button of document.querySelectorAll(".vote")) button.addEventListener("click", () => vote(button.dataset.vote));
for (const video of document.querySelectorAll("video")) {
  // Both begin together, once both are there.
  video.addEventListener("loadeddata", () => { loaded += 1; if (loaded === 2) replay(); });
  video.addEventListener("error", () => { at("broken").hidden = false; });
}
at("download").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text()], { type: "application/json" }));
  link.download = `votes-${rater.replace(/[^\p{L}\p{N}]+/gu, "-")}-${data.page.slice(0, 8)}.json`;
  link.click();
});
at("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(text());
    at("said").textContent = "copied";
  } catch {
    at("text").hidden = false;
    at("text").value = text();
    at("text").select();
  }
});
document.addEventListener("keydown", (event) => {
  const answer = { 1: "left", 2: "right", 0: "tie" }[event.key];
  if (!rater || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, textarea")) return;
  if (answer && !event.repeat && place < data.pairs.length) vote(answer);
  else if (event.key === "ArrowLeft") move(-1);
  else if (event.key === "ArrowRight") move(1);
  else if (event.key === " " && !event.target.matches("button")) { event.preventDefault(); replay(); }
});
enter(read(key) ?? "");
