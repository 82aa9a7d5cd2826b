// The keys of the console; `?` lists them.
const items = () => [...document.querySelectorAll("[data-item]")];
let here = -1;

function choose(place) {
  const all = items();
  if (!all.length) return;
  all.forEach((one) => one.classList.remove("here"));
  here = Math.max(0, Math.min(all.length - 1, place));
  all[here].classList.add("here");
  all[here].scrollIntoView({ block: "nearest" });
  if (all[here].matches("tr")) document.activeElement?.blur(); // so that Enter is not meant for what had the focus
  else all[here].focus({ preventScroll: true });
}

function follow(selector) { document.querySelector(selector)?.click(); }

function failing() {
  const all = [...document.querySelectorAll(".turn.failing, .turn.invalid")];
  const next = all[0];
  if (next) { next.tabIndex = -1; next.focus(); next.scrollIntoView({ block: "center" }); }
}

function theme() {
  const now = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = now;
  localStorage.setItem("theme", now);
  dispatchEvent(new Event("theme"));
}

const help = document.getElementById("help");
const KEYS = {
  j: () => choose(here + 1),
  k: () => choose(here - 1),
  Enter: () => { const one = items()[Math.max(here, 0)]; if (one?.dataset.href) location.assign(one.dataset.href); },
  x: () => items()[here]?.querySelector("input[type=checkbox]")?.click(),
  c: () => document.getElementById("compare")?.requestSubmit(),
  n: () => follow("a[rel=next]"),
  p: () => follow("a[rel=prev]"),
  u: () => (document.querySelector("a[rel=up]") ?? document.querySelector(".tabs a") ?? document.querySelector(".brand")).click(),
  f: failing,
  s: () => document.getElementById("smooth")?.click(),
  t: theme,
  "/": () => document.querySelector("[data-search]")?.focus(),
  "?": () => (help.open ? help.close() : help.showModal()),
};

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (event.target.matches("input, select, textarea")) { if (event.key === "Escape") event.target.blur(); return; }
  if (event.key === "Enter" && event.target.matches("a, button, summary, figure")) return;
  const action = KEYS[event.key];
  if (action) { event.preventDefault(); action(); }
});

document.addEventListener("click", (event) => {
  const row = event.target.closest("tr[data-href]");
  if (row && !event.target.closest("a, input")) location.assign(row.dataset.href);
});
document.addEventListener("submit", (event) => {
  const asked = event.target.dataset.confirm;
  if (asked && !confirm(asked)) event.preventDefault();
});
document.getElementById("theme").addEventListener("click", theme);
document.getElementById("help-button").addEventListener("click", () => help.showModal());
document.addEventListener("htmx:afterSwap", () => { here = -1; });
