"use strict";
// Sorts, filters and counts what the page's data block holds, and shows the result. Values of the data
// become text nodes and never markup.

const PER_PAGE = 60;
const EXTREMES = 6;
const data = JSON.parse(document.getElementById("data").textContent);
const several = data.runs.length > 1;
const order = new Intl.Collator(undefined, { numeric: true });
const find = (id) => document.getElementById(id);

// What is looked at.
const state = { single: !several, page: 0, first: 0, second: 1 };
let shownEntries = [];

/** Make an element. Attributes that are null are left out; children are elements or text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function format(value) {
  return value === null ? "–" : String(Number(value.toPrecision(4)));
}

/** How much better the second run is than the first; null where one of them has no score. */
function gain(item, metric) {
  const before = item.scores[metric][state.first];
  const after = item.scores[metric][state.second];
  if (!several || before === null || after === null) return null;
  return data.metrics[metric].higher ? after - before : before - after;
}

const idOf = (entry) => entry.runs.map((run) => entry.item.ids[run]).find((id) => id !== null) ?? "";

// ---- what is selected, and in which order

/** Everything there is to show: an item with its runs side by side, or with one run each. */
function allEntries() {
  const runs = data.runs.map((_, run) => run);
  if (!state.single) return data.items.map((item) => ({ item, runs }));
  return data.items.flatMap((item) =>
    runs.filter((run) => item.ids[run] !== null).map((run) => ({ item, runs: [run] })));
}

function readControls() {
  const number = (id) => (find(id).value === "" ? null : Number(find(id).value));
  return {
    metric: Number(find("metric").value),
    value: find("value").value,
    sort: find("sort").value,
    from: number("from"),
    to: number("to"),
    category: find("category").value,
    text: find("text").value.trim().toLowerCase(),
    failed: find("failed").checked,
  };
}

function valueOf(entry, wanted) {
  if (wanted.value === "gain") return gain(entry.item, wanted.metric);
  const run = wanted.value === "own" ? entry.runs[0] : Number(wanted.value);
  return entry.item.scores[wanted.metric]?.[run] ?? null;
}

const reasonsOf = (entry) =>
  entry.item.errors.flatMap((reasons, metric) =>
    entry.runs.filter((run) => reasons[run] !== null).map((run) => ({ metric, run, reason: reasons[run] })));

function passes(entry, wanted) {
  const { item, runs } = entry;
  if (wanted.category !== "" && item.category !== wanted.category) return false;
  const reasons = reasonsOf(entry);
  if (wanted.failed && reasons.length === 0) return false;
  if (wanted.text !== "") {
    const texts = [item.prompt, ...runs.map((run) => item.ids[run]), ...reasons.map(({ reason }) => reason)];
    if (!texts.some((text) => text !== null && text.toLowerCase().includes(wanted.text))) return false;
  }
  if (wanted.from === null && wanted.to === null) return true;
  const value = valueOf(entry, wanted);
  return value !== null && (wanted.from === null || value >= wanted.from) && (wanted.to === null || value <= wanted.to);
}

function sorted(entries, wanted) {
  if (wanted.sort === "data") return entries;
  if (wanted.sort === "id") return [...entries].sort((one, other) => order.compare(idOf(one), idOf(other)));
  const direction = wanted.sort === "high" ? -1 : 1;
  const keyed = entries.map((entry) => ({ entry, value: valueOf(entry, wanted) }));
  keyed.sort((one, other) => {
    if (one.value === null || other.value === null) return (one.value === null) - (other.value === null);
    return direction * (one.value - other.value);
  });
  return keyed.map(({ entry }) => entry);
}

// ---- numbers of the selection

/** The mean over prompts: the pictures of one prompt are averaged first. */
function meanOverPrompts(entries, score) {
  const prompts = new Map();
  let pictures = 0;
  for (const { item } of entries) {
    const value = score(item);
    if (value === null) continue;
    pictures += 1;
    const sum = prompts.get(item.prompt_id) ?? { total: 0, count: 0 };
    prompts.set(item.prompt_id, { total: sum.total + value, count: sum.count + 1 });
  }
  const means = [...prompts.values()].map(({ total, count }) => total / count);
  return { pictures, mean: means.length ? means.reduce((sum, mean) => sum + mean, 0) / means.length : null };
}

function selectionTable(entries) {
  const paired = several && !state.single;
  const head = ["metric", ...data.runs.flatMap((run) => [`mean ${run}`, "pictures"])];
  if (paired) head.push(`gain of ${data.runs[state.second]}`, "better / equal / worse");
  const body = data.metrics.map(({ label }, metric) => {
    const cells = data.runs.flatMap((_, run) => {
      const own = entries.filter(({ runs }) => runs.includes(run));
      const { pictures, mean } = meanOverPrompts(own, (item) => item.scores[metric][run]);
      return [format(mean), String(pictures)];
    });
    if (paired) {
      const gains = entries.map(({ item }) => gain(item, metric)).filter((value) => value !== null);
      const count = (sign) => gains.filter((value) => Math.sign(value) === sign).length;
      const mean = meanOverPrompts(entries, (item) => gain(item, metric)).mean;
      cells.push(format(mean), `${count(1)} / ${count(0)} / ${count(-1)}`);
    }
    const values = cells.map((cell) => make("td", { class: "number" }, cell));
    return make("tr", {}, make("th", { scope: "row" }, label), ...values);
  });
  const titles = head.map((text, column) => make("th", { scope: "col", class: column ? "number" : null }, text));
  return make("table", {}, make("thead", {}, make("tr", {}, ...titles)), make("tbody", {}, ...body));
}

// ---- cards

function problem(text) {
  return make("div", { class: "problem", role: "note" }, text);
}

function pictureBox(number, label, large, open) {
  if (number === null) return problem("no picture");
  const picture = data.pictures[number];
  const address = large && picture.link ? picture.link : picture.source;
  if (!address) return problem(picture.problem);
  const loading = address.startsWith("data:") ? null : "lazy";
  const image = make("img", { src: address, alt: label, loading, decoding: "async" });
  const box = large ? make("div", { class: "picture" }, image)
    : make("button", { type: "button", class: "picture", "aria-label": `Enlarge: ${label}` }, image);
  image.addEventListener("error", () => {
    // The file is not where it was: the small copy, if the page has one, else a word in its place.
    if (image.getAttribute("src") !== picture.source && picture.source) image.src = picture.source;
    else box.replaceWith(problem(`cannot be shown: ${picture.name}`));
  });
  if (open) box.addEventListener("click", open);
  return box;
}

function scoreTable(entry) {
  const { item, runs } = entry;
  const paired = several && runs.length > 1;
  const head = ["", ...(paired ? [...runs.map((run) => data.runs[run]), "gain"] : ["score"])];
  const rows = data.metrics.map(({ label }, metric) => {
    const cells = runs.map((run) => make("td", { class: "number" }, format(item.scores[metric][run])));
    if (paired) {
      const value = gain(item, metric);
      const kind = value === null || value === 0 ? "" : value > 0 ? " better" : " worse";
      cells.push(make("td", { class: `number${kind}` }, (value > 0 ? "+" : "") + format(value)));
    }
    return make("tr", {}, make("th", { scope: "row" }, label), ...cells);
  });
  const titles = head.map((text, column) =>
    make("th", { scope: "col", class: column ? "number" : null, title: text || null }, text));
  return make("table", {}, make("thead", {}, make("tr", {}, ...titles)), make("tbody", {}, ...rows));
}

function card(entry, open = null) {
  const { item, runs } = entry;
  const large = open === null;
  const prompt = item.prompt ?? "";
  const figures = [
    ...item.sources.map((number) => ["source", number]),
    ...runs.map((run) => [several ? data.runs[run] : "", item.pictures[run]]),
  ].map(([name, number]) =>
    make("figure", {}, pictureBox(number, [name, prompt || idOf(entry)].filter(Boolean).join(": "), large, open),
      ...(name ? [make("figcaption", { title: name }, name)] : [])));
  const tags = [idOf(entry), item.category, item.seed === null ? null : `seed ${item.seed}`];
  const reasons = reasonsOf(entry).map(({ metric, run, reason }) =>
    make("p", { class: "reason" }, `${several ? `${data.runs[run]}, ` : ""}${data.metrics[metric].label}: ${reason}`));
  return make("article", { class: "card" },
    make("div", { class: "pictures" }, ...figures),
    ...(prompt ? [make("p", { class: "prompt", dir: "auto", tabindex: prompt.length > 200 && !large ? "0" : null }, prompt)] : []),
    make("p", { class: "tags" }, make("bdi", {}, tags.filter((tag) => tag !== null && tag !== "").join(" · "))),
    ...reasons,
    scoreTable(entry));
}

// ---- the large view

let largeIndex = 0;

function openLarge(entries, index) {
  const dialog = find("large");
  largeIndex = index;
  shownEntries = entries;
  find("large-content").replaceChildren(card(entries[index]));
  find("large-previous").disabled = index === 0;
  find("large-next").disabled = index === entries.length - 1;
  if (!dialog.open) dialog.showModal();
}

function step(by) {
  const index = largeIndex + by;
  if (index >= 0 && index < shownEntries.length) openLarge(shownEntries, index);
}

find("large-previous").addEventListener("click", () => step(-1));
find("large-next").addEventListener("click", () => step(1));
find("large-close").addEventListener("click", () => find("large").close());
find("large").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});

// ---- the page

function fillCards(place, entries, from = 0, to = entries.length) {
  const cards = entries.slice(from, to).map((entry, index) => card(entry, () => openLarge(entries, from + index)));
  place.replaceChildren(...cards);
}

function render() {
  const wanted = readControls();
  const everything = allEntries();
  const entries = sorted(everything.filter((entry) => passes(entry, wanted)), wanted);
  const pages = Math.max(1, Math.ceil(entries.length / PER_PAGE));
  state.page = Math.min(state.page, pages - 1);
  const from = state.page * PER_PAGE;
  fillCards(find("cards"), entries, from, from + PER_PAGE);
  const what = state.single || !several ? "pictures" : data.runs.length === 2 ? "pairs" : "groups";
  find("count").textContent = `${entries.length} of ${everything.length} ${what}`;
  find("selection").replaceChildren(...(data.metrics.length && entries.length ? [selectionTable(entries)] : []));
  find("nothing").hidden = entries.length > 0;
  find("pages").hidden = pages === 1;
  find("page").textContent = `Page ${state.page + 1} of ${pages}`;
  find("previous").disabled = state.page === 0;
  find("next").disabled = state.page === pages - 1;
  const filtered = entries.length < everything.length;
  for (const note of document.querySelectorAll(".unfiltered")) note.hidden = !filtered;
}

function renderExtremes() {
  if (!several) return;
  const metric = Number(find("extremes-metric").value);
  const runs = data.runs.map((_, run) => run);
  const entries = data.items.map((item) => ({ item, runs, value: gain(item, metric) })).filter(({ value }) => value !== null);
  entries.sort((one, other) => other.value - one.value);
  const wins = entries.filter(({ value }) => value > 0).slice(0, EXTREMES);
  const losses = entries.reverse().filter(({ value }) => value < 0).slice(0, EXTREMES);
  const [first, second] = [data.runs[state.first], data.runs[state.second]];
  find("wins-title").textContent = `${second} wins most against ${first}`;
  find("losses-title").textContent = `${second} loses most against ${first}`;
  for (const [id, list] of [["wins", wins], ["losses", losses]]) {
    fillCards(find(id), list);
    if (!list.length) find(id).append(make("p", { class: "empty" }, "None."));
  }
}

function fillSelect(id, options, chosen) {
  find(id).replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  if (options.some(([value]) => value === chosen)) find(id).value = chosen;
}

/** The values that can be sorted and filtered by: they depend on the view. */
function fillValues(chosen = "") {
  const { first, second } = state;
  const gains = several ? [["gain", `gain of ${data.runs[second]} over ${data.runs[first]}`]] : [];
  const scores = state.single ? [["own", "score"]] : data.runs.map((run, number) => [String(number), `score of ${run}`]);
  fillSelect("value", state.single ? [...scores, ...gains] : [...gains, ...scores], chosen);
}

function setView(single) {
  state.single = single;
  state.page = 0;
  find("view-pairs").setAttribute("aria-pressed", String(!single));
  find("view-single").setAttribute("aria-pressed", String(single));
  fillValues();
  setCardWidth();
  render();
}

function setCardWidth() {
  const sources = data.items.some((item) => item.sources.length) ? 1 : 0;
  const across = (state.single ? 1 : data.runs.length) + sources;
  find("cards").style.setProperty("--card-width", `${Math.max(220, 175 * across)}px`);
}

function turn(by) {
  state.page += by;
  render();
  find("count").scrollIntoView({ block: "start" });
}

function setUpGallery() {
  const metrics = data.metrics.map(({ label }, number) => [String(number), label]);
  fillSelect("metric", metrics);
  const categories = [...new Set(data.items.map(({ category }) => category).filter((name) => name !== null))];
  categories.sort(order.compare);
  find("category").append(...categories.map((name) => make("option", { value: name }, name)));
  find("category").parentElement.hidden = categories.length === 0;
  const controls = find("controls");
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("input", () => { state.page = 0; render(); });
  // The controls have their first values only after the event.
  controls.addEventListener("reset", () => setTimeout(() => { state.page = 0; render(); }));
  find("previous").addEventListener("click", () => turn(-1));
  find("next").addEventListener("click", () => turn(1));
  if (several) {
    find("view-pairs").addEventListener("click", () => setView(false));
    find("view-single").addEventListener("click", () => setView(true));
    fillSelect("extremes-metric", metrics);
    find("extremes-metric").addEventListener("input", renderExtremes);
  }
  for (const id of data.runs.length > 2 ? ["first", "second"] : []) {
    fillSelect(id, data.runs.map((run, number) => [String(number), run]), String(state[id]));
    find(id).addEventListener("input", () => {
      state[id] = Number(find(id).value);
      fillValues(find("value").value);
      renderExtremes();
    });
  }
}

/** Sort the rows of a table by the values behind what is shown; rows without a value come last. */
function sortRows(table, column, descending) {
  const rows = [...table.tBodies[0].rows];
  const value = (row) => row.cells[column].dataset.value;
  const isNumber = rows.every((row) => value(row) === "" || row.cells[column].classList.contains("number"));
  rows.sort((one, other) => {
    const [a, b] = [value(one), value(other)];
    if (a === "" || b === "") return (a === "") - (b === "");
    return (descending ? -1 : 1) * (isNumber ? Number(a) - Number(b) : order.compare(a, b));
  });
  table.tBodies[0].append(...rows);
}

function makeSortable(table) {
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => {
    if (!title.textContent) return;
    const button = make("button", { type: "button" }, title.textContent);
    title.replaceChildren(button);
    if (table.tBodies[0].rows[0]?.cells[column].classList.contains("number")) title.classList.add("number");
    button.addEventListener("click", () => {
      const descending = title.getAttribute("aria-sort") === "ascending";
      for (const other of titles) other.removeAttribute("aria-sort");
      title.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortRows(table, column, descending);
    });
  });
}

for (const section of document.querySelectorAll(".scripted")) section.hidden = false;
for (const table of document.querySelectorAll("table.sortable")) makeSortable(table);
setUpGallery();
fillValues();
setCardWidth();
render();
renderExtremes();
