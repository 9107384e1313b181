// Lists the tasks, asks them, shows their answers. Whatever comes from elsewhere goes in as text, never as markup.

const KEY = "orchestrator-api-key"; // in sessionStorage, which ends with the tab
const ALL = "*";
const TEXT = "text"; // the field that fills the only column of a task, whatever that column's name
const NUM_BARS = 5;
const NUM_LABELS = 4;
const NUM_SAID = 10;
const TONES = { NON_INFERIOR: "good", INCONCLUSIVE: "warn", REGRESSED: "bad" };

const byId = (id) => document.getElementById(id);
let models = [];
let round = 0;

class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** An element with children; strings among them become text nodes. */
function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

function cell(title, className, ...children) {
  const node = make("td", "", make("div", className, ...children));
  node.setAttribute("role", "cell");
  node.dataset.title = title; // shown where a narrow screen has no room for the table's head
  return node;
}

/** Ask the API; an error has the API's own words. */
async function call(path, body) {
  const key = sessionStorage.getItem(KEY);
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), cache: "no-store" });
  } catch {
    throw new ApiError("The endpoint does not answer. Is it still running?", 0);
  }
  if (response.ok) return response;
  const content = await response.json().catch(() => null);
  throw new ApiError(content?.error?.message ?? `The endpoint answered with status ${response.status}.`, response.status);
}

async function ask(path, body) {
  return (await call(path, body)).json();
}

function percent(share) {
  if (share > 0 && share < 0.001) return "<0.1 %";
  return `${(100 * share).toFixed(1)} %`;
}

const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const shortDigest = (digest, length) => make("code", "", digest.slice(0, length));
// A long name of a base breaks behind its slashes.
const breakable = (name) => name.split("/").flatMap((part, index) => (index ? ["/", make("wbr"), part] : [part]));

// The tasks

async function load() {
  try {
    const [list, links] = await Promise.all([ask("v1/models"), ask("v1/links")]);
    models = list.data.filter((model) => model.owned_by === "adapter");
    byId("problem").replaceChildren();
    showKey(false);
    showTasks(list.broken);
    showLinks(links);
    return true;
  } catch (error) {
    const isFirstAsked = error.status === 401 && !sessionStorage.getItem(KEY);
    byId("problem").replaceChildren(make("p", isFirstAsked ? "asked" : "error", error.message));
    if (error.status === 401) closeAll();
    return false;
  }
}

/** Without a key that is known, show nothing that an earlier one opened. */
function closeAll() {
  models = [];
  for (const id of ["try", "broken", "list"]) byId(id).hidden = true;
  for (const id of ["tasks", "broken-list", "results", "links", "fields", "task"]) byId(id).replaceChildren();
  byId("summary").textContent = "This endpoint asks for an API key.";
  byId("said").textContent = "";
  showKey(true);
}

function showKey(isWanted) {
  const key = sessionStorage.getItem(KEY);
  byId("key-form").hidden = !isWanted;
  byId("key-used").hidden = isWanted || !key;
  byId("key-name").textContent = key ? `Key ${key.split("-").slice(0, 2).join("-")}-… in use.` : "";
  if (isWanted) byId("key").focus();
}

function showTasks(broken) {
  const bases = new Set(models.map((model) => model.base).filter(Boolean)).size;
  const failed = Object.keys(broken).length;
  byId("summary").textContent = models.length
    ? `${plural(models.length, "task")} over ${plural(bases, "base model")}` + (failed ? `, ${plural(failed, "champion")} broken` : "")
    : "No task answers yet. Train and promote one: orchestrator submit tasks/*.yaml";
  byId("try").hidden = byId("list").hidden = models.length === 0;
  byId("tasks").replaceChildren(...models.map(taskRow));
  byId("broken").hidden = failed === 0;
  byId("broken-list").replaceChildren(...Object.entries(broken).map(([key, why]) => make("li", "", make("b", "", key), make("p", "", why))));
  showChoice();
}

function taskRow(model) {
  const head = make("th", "", model.id);
  head.scope = "row";
  head.setAttribute("role", "rowheader");
  // Labels, columns and base of an adapter that is in the registry alone are not known yet.
  const labels = model.labels ?? [];
  const shown = labels.slice(0, NUM_LABELS).map((label) => make("span", "chip", label));
  const more = labels.length - shown.length;
  if (more > 0) shown.push(make("span", "dim", `and ${more} more`));
  const verdict = make("span", `badge ${TONES[model.verdict] ?? "calm"}`, model.verdict ?? "not judged");
  const residency = { device: "in a slot", host: "in host memory", registry: "in the registry" }[model.residency];
  const row = make(
    "tr",
    "",
    head,
    cell("Answers with", "chips", ...(shown.length ? shown : [model.labels ? "free text" : "not loaded yet"])),
    cell("Champion", "", make("span", "nowrap", `version ${model.version}`), " ", shortDigest(model.digest, 12)),
    cell("Verdict", "", verdict),
    cell("Accuracy", "number", ...accuracyOf(model)),
    cell("Base", "base", ...breakable(model.base ?? "–")),
    cell("Adapter", "nowrap", make("span", model.residency === "device" ? "dot on" : "dot"), residency),
  );
  row.setAttribute("role", "row");
  return row;
}

function accuracyOf(model) {
  if (model.accuracy === null) return [make("span", "dim", "–")];
  const size = model.num_gate_examples;
  return [make("b", "", percent(model.accuracy)), ...(size ? [" ", make("small", "", `of ${size}`)] : [])];
}

function showLinks({ report, mlflow }) {
  const items = [];
  if (report && sessionStorage.getItem(KEY)) {
    // A link cannot carry the key, so the report is fetched with it and saved.
    const button = make("button", "quiet", "Download the newest regression report");
    button.type = "button";
    button.addEventListener("click", () => saveReport(report.slice(1)));
    items.push(button);
  } else if (report) {
    items.push(linkTo(report.slice(1), "Newest regression report"));
  }
  if (mlflow) items.push(linkTo(mlflow, "MLflow"));
  byId("links").replaceChildren(...items.map((item) => make("li", "", item)));
}

function linkTo(address, text) {
  const link = make("a", "", text);
  link.href = address;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  return link;
}

async function saveReport(path) {
  try {
    const link = make("a");
    link.href = URL.createObjectURL(await (await call(path)).blob());
    link.download = "regression-report.html";
    link.click();
    URL.revokeObjectURL(link.href);
  } catch (error) {
    byId("problem").replaceChildren(make("p", "error", error.message));
  }
}

// The question

function showChoice() {
  const select = byId("task");
  const before = select.value;
  const options = models.map((model) => new Option(model.id, model.id));
  if (models.length > 1) options.unshift(new Option(`All ${models.length} tasks`, ALL));
  select.replaceChildren(...options);
  if (options.some((option) => option.value === before)) select.value = before;
  showFields();
}

const chosen = () => models.filter((model) => [ALL, model.id].includes(byId("task").value));
const fieldsOf = (model) => (model.columns && model.columns.length > 1 ? model.columns : [TEXT]);
const typed = () => new Map([...byId("fields").querySelectorAll("textarea")].map((area) => [area.name, area.value]));

/** One field per column of the chosen tasks; what was typed stays. */
function showFields() {
  const before = typed();
  const names = [...new Set(chosen().flatMap(fieldsOf))].sort((one, other) => (other === TEXT) - (one === TEXT));
  const parts = names.flatMap((name, index) => {
    const area = make("textarea");
    area.id = `field-${index}`;
    area.name = name;
    area.rows = names.length > 1 ? 2 : 4;
    area.value = before.get(name) ?? "";
    const label = make("label", "", name === TEXT ? "Text" : name);
    label.htmlFor = area.id;
    return [label, area];
  });
  byId("fields").replaceChildren(...parts);
}

async function answerAll(event) {
  event.preventDefault();
  const values = typed();
  const asked = chosen();
  const mine = ++round;
  const cards = asked.map((model) => make("article", "panel card", make("h3", "", model.id), make("p", "dim", "Asking…")));
  byId("results").replaceChildren(...cards);
  byId("said").textContent = "Asking…";
  const said = await Promise.all(
    asked.map(async (model, index) => {
      const found = await answerOf(model, values);
      if (mine === round) cards[index].replaceChildren(...found.parts); // a later question has cards of its own
      return found;
    }),
  );
  if (mine !== round) return;
  const answered = said.filter((found) => found.isAnswer).length;
  const lines = said.slice(0, NUM_SAID).map((found) => found.said);
  byId("said").textContent = `${answered} of ${plural(asked.length, "task")} answered. ${lines.join("; ")}`;
}

/** What a task says to the typed text: the parts of its card, and a line for a screen reader. */
async function answerOf(listed, values) {
  let model = listed;
  try {
    if (!model.columns) model = await ask(`v1/models/${model.id}`); // loads it
  } catch (error) {
    return failed(model, error.message, "error");
  }
  const fields = fieldsOf(model).map((name) => values.get(name) ?? "");
  if (fields.every((text) => text.trim() === "")) {
    const which = model.columns.length === 1 ? "the text is empty" : `${model.columns.join(" and ")} are empty`;
    return failed(model, `Not asked: ${which}.`, "dim");
  }
  const input = model.columns.length === 1 ? fields[0] : Object.fromEntries(model.columns.map((name, index) => [name, fields[index]]));
  try {
    const body = await ask(model.labels.length ? "v1/classify" : "v1/generate", { model: model.id, input, truncate: true });
    const [result] = body.results;
    const source = make("p", "dim source", `version ${body.version} `, shortDigest(body.digest, 8));
    const head = make("div", "row spread", make("h3", "", model.id), source);
    return { isAnswer: true, parts: [head, ...answerParts(result), ...notesOf(result)], said: `${model.id}: ${spoken(result)}` };
  } catch (error) {
    return failed(model, error.message, "error");
  }
}

function failed(model, why, tone) {
  return { isAnswer: false, parts: [make("h3", "", model.id), make("p", tone, why)], said: `${model.id}: ${why}` };
}

function spoken(result) {
  return result.probabilities ? `${result.label}, ${percent(result.probabilities[result.label])}` : result.text;
}

function answerParts(result) {
  if (!result.probabilities) return [make("p", "text", result.text)];
  const ranked = Object.entries(result.probabilities).sort((one, other) => other[1] - one[1]);
  const parts = [bars(ranked.slice(0, NUM_BARS), result.label)];
  const rest = ranked.slice(NUM_BARS);
  if (rest.length) parts.push(make("details", "", make("summary", "", plural(rest.length, "more label")), bars(rest, result.label)));
  return parts;
}

function bars(pairs, answer) {
  const rows = pairs.map(([label, share]) => {
    const fill = make("span", "fill");
    fill.style.setProperty("--share", share);
    const track = make("span", "track", fill);
    track.setAttribute("aria-hidden", "true");
    return make("li", label === answer ? "best" : "", make("span", "label", label), track, make("span", "number", percent(share)));
  });
  return make("ul", "bars", ...rows);
}

function notesOf(result) {
  const notes = [];
  if (result.is_truncated) notes.push("The text is longer than the task reads: its end was not read.");
  if (result.is_cut_off) notes.push("The answer reached the task's token limit before its end.");
  return notes.map((note) => make("p", "note", note));
}

// What a person does

byId("ask").addEventListener("submit", answerAll);
byId("task").addEventListener("change", showFields);
byId("refresh").addEventListener("click", load);
byId("fields").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});
byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value);
  byId("key").value = "";
  if (await load()) byId("task").focus();
});
byId("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  load();
});

load();
