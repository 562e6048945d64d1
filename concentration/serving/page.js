"use strict";
// An image is sent as it is; its answer comes ranked inside every vertical, the vertical with the best class first.
const SHOWN_VERTICALS = 5;
const SMALL_PIXELS = 96; // drawings this small are enlarged without smoothing
const get = (id) => document.getElementById(id);
let newest = 0; // an answer that comes after a newer image was given is dropped

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function percent(probability) {
  const shown = 100 * probability;
  if (shown >= 99.95 && probability < 1) return "> 99.9 %";
  if (shown < 0.05) return "< 0.1 %";
  return `${shown.toFixed(1)} %`;
}

function showLineage(parent, lineage, nameClass) {
  const above = lineage.slice(0, -1);
  if (above.length) parent.append(element("span", "above", above.join(" › ") + " › "));
  parent.append(element("span", nameClass, lineage[lineage.length - 1]));
}

function showHeadline(answer) {
  const headline = get("headline");
  headline.className = "";
  headline.replaceChildren();
  const [best] = answer.classes;
  const above = best.lineage.slice(0, -1);
  const isNamed = best.lineage[0].toLowerCase() === best.vertical.toLowerCase(); // the vertical's root has its name as a rule
  headline.append(element("p", "above", (isNamed ? above : [best.vertical, ...above]).join(" › ")));
  headline.append(element("p", "best", best.name));
  const line = element("p", "", percent(best.probability));
  if (answer.none_of_these) {
    line.append(element("span", "note", " — perhaps none of these classes"));
  } else if (best.is_sure) {
    line.append(element("span", "sure", " — sure"));
  }
  headline.append(line);
}

function showVerticals(classes) {
  const verticals = new Map();
  for (const found of classes) {
    if (!verticals.has(found.vertical)) verticals.set(found.vertical, []);
    verticals.get(found.vertical).push(found);
  }
  const articles = [...verticals].map(([vertical, found]) => {
    const article = element("article");
    article.dataset.vertical = vertical;
    article.append(element("h2", "", vertical));
    for (const one of found) {
      const row = element("div", "row");
      const bar = element("span", "bar");
      bar.style.width = `${100 * one.probability}%`;
      const label = element("span");
      showLineage(label, one.lineage, "");
      row.append(bar, label, element("span", "number", percent(one.probability)));
      article.append(row);
    }
    return article;
  });
  get("verticals").replaceChildren(...articles);
  const rest = articles.slice(SHOWN_VERTICALS);
  for (const article of rest) article.hidden = true;
  const more = get("more");
  more.hidden = rest.length === 0;
  more.textContent = `${rest.length} more vertical${rest.length === 1 ? "" : "s"}`;
  more.onclick = () => {
    for (const article of rest) article.hidden = false;
    more.hidden = true;
  };
}

function showNeighbours(neighbours) {
  const box = get("neighbours");
  box.hidden = !neighbours;
  if (!neighbours) return;
  const lines = neighbours.map((near) => {
    const row = element("div", "row");
    const bar = element("span", "bar");
    bar.style.width = `${100 * near.share}%`;
    row.append(bar, element("span", "", near.name), element("span", "number", `${near.similarity.toFixed(2)} alike`));
    return row;
  });
  box.replaceChildren(element("h2", "", "Known images that lie near show"), ...lines);
}

function showError(text) {
  const headline = get("headline");
  headline.className = "error";
  headline.replaceChildren(element("p", "", text));
  get("verticals").replaceChildren();
  get("neighbours").hidden = true;
  get("more").hidden = true;
}

function showPreview(file) {
  const preview = get("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.onload = () => preview.classList.toggle("small", Math.max(preview.naturalWidth, preview.naturalHeight) <= SMALL_PIXELS);
  preview.src = URL.createObjectURL(file);
  preview.alt = file.name || "the image that was given";
  preview.hidden = false;
  get("hint").hidden = true;
  get("drop").classList.add("filled");
}

async function ask(file, note) {
  const number = ++newest;
  showPreview(file);
  document.body.classList.add("busy");
  get("took").textContent = "…";
  const started = performance.now();
  let problem = "This file cannot be read: a folder, perhaps, or one that is gone.";
  try {
    await file.slice(0, 1).arrayBuffer();
    problem = "No answer: is `concentrate demo` still running?";
    const response = await fetch("answer", { method: "POST", body: file });
    const answer = await response.json();
    if (number !== newest) return;
    if (answer.error) {
      showError(`This image ${answer.error}.`);
    } else {
      showHeadline(answer);
      showVerticals(answer.classes);
      showNeighbours(answer.neighbours);
    }
    get("took").textContent = `${file.name || "pasted"}${note} · ${Math.round(performance.now() - started)} ms`;
  } catch (error) {
    if (number !== newest) return;
    showError(problem);
    get("took").textContent = file.name || "pasted";
  } finally {
    if (number === newest) document.body.classList.remove("busy");
  }
}

function take(files) {
  const [file] = files;
  if (file) ask(file, files.length > 1 ? `, the first of ${files.length}` : "");
}

get("file").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = ""; // the same file may be given again
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  if (event.dataTransfer.files.length) {
    take(event.dataTransfer.files);
  } else {
    newest += 1;
    document.body.classList.remove("busy");
    showError("That was no file, but a text or a link: save the image, or copy and paste it.");
    get("took").textContent = "\u00a0";
  }
});
document.addEventListener("paste", (event) => take(event.clipboardData.files));

fetch("about").then((response) => response.json()).then((about) => {
  get("name").textContent = about.name;
  document.title = `${about.name} · concentration`;
  const count = about.num_classes.toLocaleString("en");
  get("about").textContent = `${count} classes in ${about.verticals.length} verticals`;
});
