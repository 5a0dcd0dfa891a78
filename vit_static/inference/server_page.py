"""The page that `serve` shows at /: an image by drag and drop, its classes, and where the model looked."""

from __future__ import annotations

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>vit_static</title><style>
:root { color-scheme: light dark; --line: #8886; --bar: #2a7de1; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; }
h1 { font-size: 1.3em; margin: 0; }
#about, #said { color: #777; margin: .2em 0 1em; }
#drop { display: block; border: 2px dashed var(--line); border-radius: .6em; padding: 1.6em; text-align: center;
  cursor: pointer; }
#drop.over, #drop:focus-within { border-color: var(--bar); }
#drop input { position: absolute; opacity: 0; width: 1px; }
#found { display: flex; flex-wrap: wrap; gap: 1.5em; margin-top: 1.5em; }
#found[hidden] { display: none; }
figure { flex: 1 1 22em; margin: 0; }
canvas { max-width: 100%; max-height: 70vh; border-radius: .3em; }
#classes { flex: 1 1 20em; margin: 0; padding: 0; list-style: none; }
#classes li { margin-bottom: .5em; }
#classes span { display: flex; justify-content: space-between; gap: 1em; }
#classes i { display: block; height: .5em; border-radius: .25em; background: var(--bar); min-width: 1px; }
#said.error { color: #c22; }
</style></head><body>
<h1>vit_static</h1><p id="about"></p>
<label id="drop">Drop an image here, or choose one<input id="file" type="file" accept="image/*"></label>
<p id="said" role="status"></p>
<div id="found" hidden>
<figure><canvas id="picture"></canvas>
<figcaption><label><input id="shown" type="checkbox" checked> where the model looked</label></figcaption></figure>
<ol id="classes"></ol></div>
<script>
"use strict";
const at = id => document.getElementById(id);
let newest = 0, picture = null, attention = null;

function say(text, isError = false) {
  at("said").textContent = text;
  at("said").className = isError ? "error" : "";
}

async function ask(path, file) {
  const answer = await fetch(path, {method: "POST", body: file});
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

function draw() {
  const canvas = at("picture"), pen = canvas.getContext("2d");
  const longest = Math.max(picture.width, picture.height);
  const scale = Math.min(Math.max(longest, 320), 1000) / longest;
  canvas.width = scale * picture.width;
  canvas.height = scale * picture.height;
  pen.imageSmoothingQuality = "high";
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  if (!attention || !at("shown").checked) return;
  // A pixel a patch, enlarged smoothly over the part of the image that the model saw; the rest is darkened.
  const rows = attention.grid.length, columns = attention.grid[0].length, shares = attention.grid.flat();
  const least = Math.min(...shares), most = Math.max(...shares);
  const small = new OffscreenCanvas(columns, rows), dots = new ImageData(columns, rows);
  shares.forEach((share, n) => dots.data.set([255, 60, 0, 180 * (share - least) / (most - least)], 4 * n));
  small.getContext("2d").putImageData(dots, 0, 0);
  const [left, top, width, height] = attention.box.map((share, n) => share * (n % 2 ? canvas.height : canvas.width));
  pen.fillStyle = "#0008";
  pen.beginPath();
  pen.rect(0, 0, canvas.width, canvas.height);
  pen.rect(left, top, width, height);
  pen.fill("evenodd");
  pen.save();
  pen.beginPath();
  pen.rect(left, top, width, height);
  pen.clip();
  pen.drawImage(small, left, top, width, height);
  pen.restore();
}

function list(top) {
  at("classes").replaceChildren(...top.map(entry => {
    const item = document.createElement("li"), line = document.createElement("span"), bar = document.createElement("i");
    for (const text of [entry.name, (100 * entry.probability).toFixed(1) + " %"])
      line.append(Object.assign(document.createElement("span"), {textContent: text}));
    bar.style.width = 100 * entry.probability + "%";
    item.append(line, bar);
    return item;
  }));
}

async function show(file) {
  const mine = ++newest;
  say("looking at " + file.name + " ...");
  try {
    // As the model sees it: a photo's orientation is not applied.
    const [drawn, found] = await Promise.all([
      createImageBitmap(file, {imageOrientation: "none"}).catch(() => null), ask("predict", file)]);
    if (mine !== newest) return;
    [picture, attention] = [drawn, null];
    list(found.top);
    at("found").hidden = false;
    if (picture) draw();
    const looked = await ask("attention", file);
    if (mine !== newest) return;
    attention = looked;
    if (picture) draw();
    say(file.name);
  } catch (error) {
    if (mine === newest) say(error.message, true);
  }
}

at("file").addEventListener("change", event => event.target.files[0] && show(event.target.files[0]));
at("shown").addEventListener("change", () => picture && draw());
for (const name of ["dragover", "dragleave", "drop"])
  addEventListener(name, event => {
    event.preventDefault();
    at("drop").classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files[0]) show(event.dataTransfer.files[0]);
  });
fetch("health").then(answer => answer.json()).then(said =>
  at("about").textContent = `${said.model}, ${said.num_classes} classes, ${said.runs_in}`);
</script></body></html>
"""
