// The filter shows one set or two policies; a video is fetched when it comes into view.
const filter = document.getElementById("filter");
if (filter) {
  const parts = [...document.querySelectorAll("[data-where]")];
  const selects = { where: document.getElementById("where"), pair: document.getElementById("pair") };
  for (const [name, select] of Object.entries(selects)) {
    const values = new Set(parts.map((part) => part.dataset[name]).filter(Boolean));
    for (const value of values) select.add(new Option(value, value));
    select.parentElement.hidden = values.size < 2;
  }
  filter.hidden = Object.values(selects).every((select) => select.parentElement.hidden);
  filter.addEventListener("change", () => {
    const fits = (part, name) => !selects[name].value || [undefined, selects[name].value].includes(part.dataset[name]);
    for (const part of parts) part.hidden = !fits(part, "where") || !fits(part, "pair");
    const shown = document.getElementById("shown");
    if (shown) shown.textContent = document.querySelectorAll("article:not([hidden])").length;
  });
}
const near = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (isIntersecting) { target.preload = "metadata"; near.unobserve(target); }
  }
}, { rootMargin: "300px" });
for (const video of document.querySelectorAll("video")) near.observe(video);
