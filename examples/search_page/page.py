"""The page that ``server.py`` serves: style, script and the policy that keeps it to itself."""

STYLE = r"""
:root { color-scheme: light dark; --ink: #1c2430; --soft: #59636f; --paper: #f6f7f9; --card: #fff;
  --line: #c9d0d8; --accent: #0b57d0; --mark: #fff1b8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a3adb9; --paper: #13171d;
  --card: #1c222b; --line: #434d5a; --accent: #8ab4f8; --mark: #5a4a12; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.25rem 1rem 3rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 0 0 .75rem; }
body:not(:has(section + section)) { max-width: 56rem; }
form { display: flex; gap: .5rem; flex-wrap: wrap; }
input, select, button { font: inherit; color: inherit; background: var(--card); padding: .55rem .75rem;
  border: 1px solid var(--line); border-radius: .5rem; }
input { flex: 1 1 18rem; min-width: 0; }
button { background: var(--accent); color: var(--paper); font-weight: 600; cursor: pointer; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
#status { margin: .75rem 0; min-height: 1.5em; color: var(--soft); }
#status:empty { min-height: 0; }
[hidden] { display: none !important; }
#start { display: flex; flex-wrap: wrap; gap: .5rem; }
#start p { flex-basis: 100%; margin: 0; color: var(--soft); }
#start button { background: var(--card); color: var(--accent); font-weight: 400; }
#sides { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
dl, dl div, header { display: flex; flex-wrap: wrap; gap: .1rem .7rem; font-size: .85rem;
  color: var(--soft); }
dl { margin: .75rem 0 0; font-size: .75rem; }
h2 { font-size: 1rem; margin: 0 0 .5rem; }
dl div { gap: .3rem; }
dd { margin: 0; color: var(--ink); }
footer { margin: .3rem 0 0; font-size: .75rem; color: var(--soft); }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: .6rem; }
li { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .6rem .8rem; }
a { color: var(--accent); overflow-wrap: anywhere; }
.text { margin: .25rem 0 0; overflow-wrap: anywhere; font-size: .92rem; max-height: 15em; overflow: auto; }
.text > * { margin: 0 0 .5rem; }
.text > :last-child { margin-bottom: 0; }
.text :is(h1, h2, h3, h4, h5, h6) { font-size: 1em; }
.text :is(ul, ol) { padding-left: 1.3rem; }
.text ul { list-style: disc; }
.text ol { list-style: decimal; }
.text :is(ul, ol) { display: block; }
.text li { background: none; border: 0; padding: 0; }
.text :is(code, pre) { background: var(--paper); border-radius: .25rem; font-size: .92em; }
.text code { padding: 0 .2em; }
.text pre { padding: .4rem .6rem; white-space: pre-wrap; }
.text pre code { padding: 0; }
.text th, .text td { border-bottom: 1px solid var(--line); padding: .1rem .6rem .1rem 0; text-align: left; }
.plain { white-space: pre-wrap; }
mark { background: var(--mark); color: inherit; border-radius: .2rem; }
"""

SCRIPT = r"""
const form = document.querySelector("form"), { q: box, k: many } = form.elements, plain = document.title;
const said = document.getElementById("status"), sides = document.getElementById("sides");
const start = document.getElementById("start"), took = document.getElementById("took");
let running;
const mb = bytes => bytes === null ? "unknown" : (bytes / 1e6).toFixed(1) + " MB";
function add(parent, tag, text = "") {
  const made = parent.appendChild(document.createElement(tag));
  made.textContent = text;  // never as HTML
  return made;
}
function show(answer) {
  sides.replaceChildren();
  const found = answer.sides.map(side => new Set(side.hits.map(hit => hit.id)));
  for (const side of answer.sides) {
    const part = add(sides, "section"), title = add(part, "h2", side.name), facts = add(part, "dl");
    part.setAttribute("aria-labelledby", title.id = "side-" + sides.childElementCount);
    const unpacked = side.unpacked_bytes ? ` + ${mb(side.unpacked_bytes)} unpacked` : "";
    for (const [name, value] of [["embed", side.embed_ms.toFixed(1) + " ms"],
        ["search", side.search_ms.toFixed(2) + " ms"], ["weights", mb(side.weight_bytes) + unpacked],
        ["index", mb(side.index_bytes)]]) {
      const pair = add(facts, "div");
      add(pair, "dt", name);
      add(pair, "dd", value);
    }
    const list = add(part, "ol");
    for (const hit of side.hits) {
      const item = add(list, "li"), head = add(item, "header"), text = add(item, "div");
      text.className = "text";
      text.innerHTML = hit.html;  // escaped by the server
      add(head, "b", hit.score.toFixed(3));
      Object.assign(add(head, "a", hit.id), { href: hit.link, target: "_blank", rel: "noopener" });
      if (!found.every(ids => ids.has(hit.id))) add(head, "span", "only here");
      if (text.scrollHeight > text.clientHeight) text.tabIndex = 0;  // so that keys can scroll it
    }
    part.append(facts);  // below the hits
  }
  const shared = [...found[0]].filter(id => found.every(ids => ids.has(id))).length;
  const passages = answer.passages.toLocaleString("en");
  said.textContent = `${passages} ${answer.passages === 1 ? "passage" : "passages"} searched`;
  took.textContent = `answered in ${answer.total_ms.toFixed(1)} ms` +
    (answer.batch > 1 ? ` in a batch of ${answer.batch}` : "") +
    (found.length > 1 ? `; ${shared} of ${found[0].size} hits on both sides` : "") +
    `; the process holds ${mb(answer.resident_bytes)}`;
}
async function begin() {
  const corpus = await (await fetch("api/corpus")).json(), count = n => n.toLocaleString("en");
  document.querySelector("h1").textContent = "Search in " + corpus.name;
  add(start, "p", `${count(corpus.documents)} documents, ${count(corpus.passages)} passages. Try:`);
  for (const example of corpus.examples) add(start, "button", example).addEventListener("click", () => {
    box.value = example;
    form.requestSubmit();
  });
}
async function ask() {
  const q = box.value.trim();
  start.hidden = Boolean(q);
  document.title = q ? q + " - " + plain : plain;
  running?.abort();
  sides.replaceChildren();
  took.textContent = "";
  said.textContent = q ? "Searching ..." : "";
  if (!q) return;
  const signal = (running = new AbortController()).signal;
  try {
    const reply = await fetch("api/search?" + new URLSearchParams({ q, k: many.value }), { signal });
    const answer = await reply.json();
    if (reply.ok) show(answer);
    else said.textContent = answer.detail;
  } catch (error) {
    if (error.name !== "AbortError") said.textContent = "The server does not answer: " + error.message;
  }
}
function fromAddress() {
  const address = new URLSearchParams(location.search);
  box.value = address.get("q") ?? "";
  if ([...many.options].some(option => option.value === address.get("k"))) many.value = address.get("k");
  ask();
}
form.addEventListener("submit", event => {
  event.preventDefault();
  history.pushState(null, "", "?" + new URLSearchParams({ q: box.value.trim(), k: many.value }));
  ask();
});
many.addEventListener("change", () => form.requestSubmit());
addEventListener("popstate", fromAddress);
fromAddress();
begin();
"""

PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Semantic search</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{STYLE}</style></head><body><main><h1>Semantic search</h1>
<form role="search"><input type="search" name="q" aria-label="Question" placeholder="Ask in your own words"
  maxlength="1000" autocomplete="off" autofocus>
<select name="k" aria-label="Hits shown"><option>5<option selected>10<option>20<option>50</select>
<button>Search</button></form>
<p id="status" role="status"></p><div id="start"></div><div id="sides"></div><footer id="took"></footer>
<noscript>This page needs JavaScript; api/search?q=...&amp;k=10 answers in JSON.</noscript></main>
<script>{SCRIPT}</script></body></html>"""

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'self'"
)
"""Nothing is fetched from elsewhere, and nothing is sent there."""
