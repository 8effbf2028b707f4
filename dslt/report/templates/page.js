"use strict";
// The theme's button and the browser of predictions. Text from runs reaches the page through
// textContent alone.

const $ = (id) => document.getElementById(id);
const ROW_HEIGHT = 34; // pixels, as in the style sheet
const MARGIN_ROWS = 8; // drawn above and below what is seen

function startTheme() {
  const themes = ["auto", "light", "dark"];
  let theme = "auto";
  try { theme = localStorage.getItem("dslt-theme") ?? "auto"; } catch { /* files may have no storage */ }
  const show = () => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    $("theme").textContent = `Theme: ${theme}`;
  };
  $("theme").addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    try { localStorage.setItem("dslt-theme", theme); } catch { /* likewise */ }
    show();
  });
  if (!themes.includes(theme)) theme = "auto";
  show();
}

async function unpack() {
  const bytes = Uint8Array.from(atob($("data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

function startBrowser({ strings, problems, runs }) {
  const text = (index) => (index < 0 ? null : strings[index]);
  const rowOfProblem = runs.map((run) => new Map(run.problem.map((problem, row) => [problem, row])));
  let lower = null; // every string in lower case, made at the first search
  let shown = []; // rows of the chosen run that pass the filters
  let selected = 0; // a place in `shown`

  const add = (select, value, label) => select.append(new Option(label, value));
  runs.forEach((run, i) => { add($("run"), i, run.title); add($("other"), i, run.title); });
  for (const [name, column] of [["split", problems.split], ["dataset", problems.dataset]])
    for (const index of new Set(column)) add($(name), index, strings[index]);

  const chosen = () => runs[$("run").value];
  const other = () => ($("other").value === "" ? null : runs[$("other").value]);
  const otherRow = (row) =>
    other() ? rowOfProblem[$("other").value].get(chosen().problem[row]) : undefined;

  function filter() {
    const run = chosen(), beside = other();
    const split = $("split").value, dataset = $("dataset").value;
    const verdict = $("verdict").value, disagreement = $("disagreement").value;
    const needle = $("text").value.trim().toLowerCase();
    let found = null;
    if (needle) {
      lower ??= strings.map((string) => string.toLowerCase());
      found = lower.map((string) => string.includes(needle));
    }
    const needsOther = ["other", "only", "only-other"].includes(disagreement);
    shown = [];
    for (let row = 0; row < run.problem.length; row++) {
      const problem = run.problem[row], right = run.right[row], teacher = run.teacher_right[row];
      if (split && problems.split[problem] !== +split) continue;
      if (dataset && problems.dataset[problem] !== +dataset) continue;
      if (verdict === "right" && right !== 1) continue;
      if (verdict === "wrong" && right !== 0) continue;
      if (verdict === "gain" && !(right === 1 && teacher === 0)) continue;
      if (verdict === "loss" && !(right === 0 && teacher === 1)) continue;
      if (disagreement === "teacher" && (run.teacher_key[row] < 0 || run.key[row] === run.teacher_key[row])) continue;
      const there = beside ? otherRow(row) : undefined;
      if (needsOther && there === undefined) continue;
      if (disagreement === "other" && run.key[row] === beside.key[there]) continue;
      if (disagreement === "only" && !(right === 1 && beside.right[there] === 0)) continue;
      if (disagreement === "only-other" && !(right === 0 && beside.right[there] === 1)) continue;
      if (found) {
        const places = [problems.input[problem], problems.gold[problem], problems.id[problem],
          run.answer[row], run.rationale[row], run.teacher_answer[row], run.teacher_rationale[row]];
        if (there !== undefined) places.push(beside.answer[there], beside.rationale[there]);
        if (!places.some((index) => found[index])) continue;
      }
      shown.push(row);
    }
    selected = 0;
    const judged = shown.filter((row) => run.right[row] >= 0);
    const hits = judged.filter((row) => run.right[row] === 1).length;
    const share = judged.length ? `; ${(100 * hits / judged.length).toFixed(1)} % of them right` : "";
    $("count").textContent =
      `${shown.length.toLocaleString("en")} of ${run.problem.length.toLocaleString("en")} predictions${share}` +
      (needsOther && !beside ? ". Choose a run beside it to see where the two differ." : "");
    $("space").style.height = `${shown.length * ROW_HEIGHT}px`;
    $("rows").scrollTop = 0;
    document.querySelector(".browser").style.setProperty("--answers", beside ? 4 : 3);
    fill($("head"), ["", "problem", "gold", "teacher", "student", ...(beside ? ["other"] : [])]);
    draw();
    showDetail();
  }

  // A row's cells; in narrow windows the mark, the problem and the student's answer remain.
  function fill(element, cells) {
    element.replaceChildren(...cells.map((cell, i) => {
      const span = document.createElement("span");
      span.textContent = cell ?? "–";
      if (![0, 1, 4].includes(i)) span.className = "aside";
      return span;
    }));
  }

  const mark = (right) => (right === 1 ? "✓" : right === 0 ? "✗" : "");
  const tone = (right) => (right === 1 ? "right" : right === 0 ? "wrong" : "");

  function makeRow(place) {
    const run = chosen(), row = shown[place], problem = run.problem[row], there = otherRow(row);
    const element = document.createElement("div");
    element.className = "row";
    element.id = `row-${place}`;
    element.style.top = `${place * ROW_HEIGHT}px`;
    element.setAttribute("role", "option");
    element.setAttribute("aria-setsize", shown.length);
    element.setAttribute("aria-posinset", place + 1);
    element.setAttribute("aria-selected", place === selected);
    const cells = [mark(run.right[row]), text(problems.input[problem]), text(problems.gold[problem]),
      text(run.teacher_answer[row]), text(run.answer[row])];
    if (other()) cells.push(there === undefined ? null : `${mark(other().right[there])} ${text(other().answer[there])}`);
    fill(element, cells);
    element.children[0].className = tone(run.right[row]);
    element.children[0].setAttribute("aria-label", tone(run.right[row]));
    if (tone(run.right[row])) element.children[4].classList.add(tone(run.right[row]));
    if (there !== undefined && tone(other().right[there])) element.children[5].classList.add(tone(other().right[there]));
    element.addEventListener("click", () => move(place));
    return element;
  }

  function draw() {
    const list = $("rows");
    const first = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - MARGIN_ROWS);
    const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW_HEIGHT) + MARGIN_ROWS);
    const rows = [];
    for (let place = first; place < last; place++) rows.push(makeRow(place));
    $("space").replaceChildren(...rows);
    if (selected >= first && selected < last) list.setAttribute("aria-activedescendant", `row-${selected}`);
    else list.removeAttribute("aria-activedescendant");
  }

  function move(place) {
    if (!shown.length) return;
    selected = Math.max(0, Math.min(shown.length - 1, place));
    const list = $("rows"), top = selected * ROW_HEIGHT;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW_HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW_HEIGHT - list.clientHeight;
    draw();
    showDetail();
  }

  function showDetail() {
    const parts = [];
    const part = (title, ...paragraphs) => {
      const heading = document.createElement("h3");
      heading.textContent = title;
      parts.push(heading);
      for (const [string, name, missing = "none"] of paragraphs) {
        const paragraph = document.createElement("p");
        paragraph.textContent = string ?? missing;
        paragraph.className = string === null ? "none" : name;
        parts.push(paragraph);
      }
    };
    const answer = (string, right) =>
      [string === null ? null : `${string} ${mark(right)}`, `answer ${tone(right)}`, "no answer"];
    const rationale = (index) => [text(index), "", "no rationale"];
    if (shown.length) {
      const run = chosen(), row = shown[selected], problem = run.problem[row], there = otherRow(row);
      const place = ["dataset", "split", "id"].map((name) => text(problems[name][problem])).join(" · ");
      part(place, [text(problems.input[problem]), "problem"]);
      part("Gold", [text(problems.gold[problem]), "answer"]);
      part("Teacher", answer(text(run.teacher_answer[row]), run.teacher_right[row]),
        rationale(run.teacher_rationale[row]));
      part(`Student: ${run.title}`, answer(text(run.answer[row]), run.right[row]), rationale(run.rationale[row]));
      if (there !== undefined)
        part(`Beside it: ${other().title}`, answer(text(other().answer[there]), other().right[there]),
          rationale(other().rationale[there]));
    }
    $("detail").replaceChildren(...parts);
    $("detail").scrollTop = 0;
  }

  const pageRows = () => Math.max(1, Math.floor($("rows").clientHeight / ROW_HEIGHT) - 1);
  const MOVES = {
    ArrowDown: () => selected + 1, ArrowUp: () => selected - 1,
    PageDown: () => selected + pageRows(), PageUp: () => selected - pageRows(),
    Home: () => 0, End: () => shown.length - 1,
  };
  $("rows").addEventListener("keydown", (event) => {
    if (!(event.key in MOVES) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    move(MOVES[event.key]());
  });
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "Enter") { event.preventDefault(); $("rows").focus(); }
    if (event.key === "Escape") { event.preventDefault(); $("text").value = ""; filter(); $("rows").focus(); }
  });
  document.addEventListener("keydown", (event) => {
    const isTyping = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
    if (event.key !== "/" || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    $("predictions").scrollIntoView({ block: "start" });
    $("text").focus({ preventScroll: true });
    $("text").select();
  });
  $("rows").addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
  addEventListener("resize", draw);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("input", filter);
  filter();
}

startTheme();
if ($("rows")) {
  unpack().then(startBrowser, (error) => {
    $("count").textContent = `The predictions cannot be unpacked here (${error}).`;
  });
}
