"use strict";
// Sliders, attention maps and curves of `muse report`. Everything it draws is in #facts.
const facts = JSON.parse(document.getElementById("facts").textContent);
const words = (value) => (Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3)
  ? value.toExponential(1) : String(Number(value.toPrecision(4))));

// ------------------------------------------------------------------------------------- sliders
for (const input of document.querySelectorAll(".pair input")) {
  const show = () => input.parentElement.style.setProperty("--cut", `${input.value}%`);
  input.addEventListener("input", show);
  show();
}

// ----------------------------------------------------------------------------------- attention
const HEAT = [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]];

function heat(share) {
  const place = Math.min(share, 0.9999) * (HEAT.length - 1);
  const low = Math.floor(place);
  return HEAT[low].map((value, i) => value + (place - low) * (HEAT[low + 1][i] - value));
}

const unpack = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

class Explorer {
  constructor(root) {
    this.root = root;
    const { grid, maps } = facts.attention[Number(root.dataset.run)];
    [this.rows, this.columns] = grid;
    this.maps = maps.map((one) => one.map((map) => ({ ...map, weights: unpack(map.weights) })));
    this.cell = Math.floor(this.rows / 2) * this.columns + Math.floor(this.columns / 2);
    this.pictures = [...root.querySelectorAll(".chooser img")];
    this.reading = root.querySelector(".reading");
    this.build(root.querySelector(".maps"));
    root.querySelectorAll(".chooser button").forEach((button) => {
      button.addEventListener("click", () => this.choose(Number(button.dataset.picture)));
    });
    this.choose(0);
  }

  build(place) {
    const query = document.createElement("figure");
    this.patches = document.createElement("div");
    this.patches.className = "patches";
    this.patches.setAttribute("role", "group");
    this.patches.setAttribute("aria-label", "patches of the picture");
    this.patches.style.gridTemplateColumns = `repeat(${this.columns}, 1fr)`;
    for (let cell = 0; cell < this.rows * this.columns; cell += 1) {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-label", `patch in ${this.where(cell)}`);
      button.addEventListener("click", () => this.select(cell));
      this.patches.append(button);
    }
    this.patches.addEventListener("keydown", (event) => this.move(event));
    const caption = document.createElement("figcaption");
    caption.textContent = "choose a patch";
    query.append(this.patches, caption);
    place.append(query);
    this.canvases = this.maps[0].map((map) => {
      const figure = document.createElement("figure");
      const canvas = document.createElement("canvas");
      canvas.width = 256;
      canvas.height = 256;
      canvas.setAttribute("role", "img");
      const label = document.createElement("figcaption");
      label.textContent = map.label;
      figure.append(canvas, label);
      place.append(figure);
      return canvas;
    });
  }

  where(cell) {
    return `row ${Math.floor(cell / this.columns) + 1}, column ${(cell % this.columns) + 1}`;
  }

  choose(index) {
    this.index = index;
    this.root.querySelectorAll(".chooser button").forEach((button, i) => {
      button.setAttribute("aria-pressed", String(i === index));
    });
    const picture = this.pictures[index];
    this.patches.style.backgroundImage = `url("${picture.src}")`;
    picture.decode().then(() => {
      this.grey = dimmed(picture);
      this.select(this.cell);
    });
  }

  move(event) {
    const buttons = [...this.patches.children];
    const cell = buttons.indexOf(document.activeElement);
    const [row, column] = [Math.floor(cell / this.columns), cell % this.columns];
    const target = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      Home: [row, 0], End: [row, this.columns - 1],
    }[event.key];
    if (cell < 0 || !target) return;
    event.preventDefault();
    const inside = (value, count) => Math.min(Math.max(value, 0), count - 1);
    const next = inside(target[0], this.rows) * this.columns + inside(target[1], this.columns);
    buttons[cell].tabIndex = -1;
    buttons[next].tabIndex = 0;
    buttons[next].focus();
  }

  select(cell) {
    this.cell = cell;
    [...this.patches.children].forEach((button, i) => {
      button.setAttribute("aria-pressed", String(i === cell));
      button.tabIndex = i === cell ? 0 : -1;
    });
    const maps = this.maps[this.index];
    const parts = maps.map((map, i) => this.draw(this.canvases[i], map));
    this.reading.textContent = `From ${this.where(cell)}. Largest weight: ${parts.join("; ")}.`;
  }

  draw(canvas, map) {
    const count = this.rows * this.columns;
    const row = map.weights.subarray(this.cell * count, (this.cell + 1) * count);
    const small = document.createElement("canvas");
    small.width = this.columns;
    small.height = this.rows;
    const pixels = new ImageData(this.columns, this.rows);
    row.forEach((weight, i) => pixels.data.set([...heat(weight / 255), 255], 4 * i));
    small.getContext("2d").putImageData(pixels, 0, 0);
    const pen = canvas.getContext("2d");
    const { width, height } = canvas;
    pen.globalAlpha = 1;
    pen.drawImage(this.grey, 0, 0, width, height);
    pen.globalAlpha = 0.62;
    pen.imageSmoothingEnabled = true;
    pen.drawImage(small, 0, 0, width, height);
    pen.globalAlpha = 1;
    pen.strokeStyle = "#fff";
    pen.lineWidth = 2;
    const [w, h] = [width / this.columns, height / this.rows];
    pen.strokeRect((this.cell % this.columns) * w + 1, Math.floor(this.cell / this.columns) * h + 1, w - 2, h - 2);
    const most = row.indexOf(Math.max(...row));
    const share = `${(100 * map.peaks[this.cell]).toFixed(1)} %`;
    const text = `${map.label} ${share} on ${this.where(most)}`;
    canvas.setAttribute("aria-label", text);
    return text;
  }
}

function dimmed(picture) {
  const canvas = document.createElement("canvas");
  canvas.width = 256;
  canvas.height = 256;
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(picture, 0, 0, 256, 256);
  const image = pen.getImageData(0, 0, 256, 256);
  for (let i = 0; i < image.data.length; i += 4) {
    const grey = (image.data[i] + image.data[i + 1] + image.data[i + 2]) / 3;
    image.data.fill(grey, i, i + 3);
  }
  pen.putImageData(image, 0, 0);
  return canvas;
}

document.querySelectorAll(".attention").forEach((root) => new Explorer(root));

// -------------------------------------------------------------------------------------- curves
const WIDTH = 320, HEIGHT = 170, LEFT = 54, BOTTOM = 20, TOP = 6;

class Chart {
  constructor(name, place) {
    this.name = name;
    this.lines = facts.curves.runs.map((run, index) => ({
      index, name: run.name, steps: run.steps, values: run.values[name] || [], shown: true,
    }));
    this.root = document.createElement("div");
    this.root.className = "chart";
    const title = document.createElement("h3");
    title.textContent = name;
    this.drawing = document.createElement("div");
    this.drawing.tabIndex = 0;
    this.drawing.setAttribute("role", "img");
    this.readout = document.createElement("p");
    this.readout.className = "readout";
    this.root.append(title, this.drawing, this.readout);
    place.append(this.root);
    this.drawing.addEventListener("pointermove", (event) => this.point(event));
    this.drawing.addEventListener("pointerdown", (event) => this.point(event));
    this.drawing.addEventListener("keydown", (event) => this.key(event));
    this.draw(false);
  }

  draw(logarithmic) {
    const seen = this.lines.filter((line) => line.shown);
    const usable = (value) => value !== null && (!logarithmic || value > 0);
    const values = seen.flatMap((line) => line.values.filter(usable));
    const steps = seen.flatMap((line) => line.steps.filter((_, i) => usable(line.values[i] ?? null)));
    this.steps = [...new Set(steps)].sort((a, b) => a - b);
    if (!values.length) {
      this.drawing.innerHTML = "";
      this.readout.textContent = logarithmic ? "no positive value" : "no value";
      return;
    }
    const scale = logarithmic ? Math.log10 : (value) => value;
    let [low, high] = [Infinity, -Infinity];
    values.forEach((value) => { low = Math.min(low, scale(value)); high = Math.max(high, scale(value)); });
    if (high - low < 1e-12) { low -= 0.5 * Math.abs(low) || 0.5; high += 0.5 * Math.abs(high) || 0.5; }
    const [first, last] = [this.steps[0], this.steps[this.steps.length - 1]];
    this.x = (step) => LEFT + (last > first ? (step - first) / (last - first) : 0.5) * (WIDTH - LEFT - 6);
    const y = (value) => TOP + (1 - (scale(value) - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    const ticks = [0, 0.5, 1].map((share) => low + share * (high - low));
    const text = (tick) => words(logarithmic ? 10 ** tick : tick);
    const axes = ticks.map((tick, i) => {
      const level = TOP + (1 - i / 2) * (HEIGHT - TOP - BOTTOM);
      return `<line class="axis" x1="${LEFT}" x2="${WIDTH - 6}" y1="${level}" y2="${level}"/>`
        + `<text x="${LEFT - 6}" y="${level + 4}" text-anchor="end">${text(tick)}</text>`;
    });
    const paths = seen.map((line) => {
      let path = "", pen = false, dots = "";
      line.values.forEach((value, i) => {
        if (!usable(value)) { pen = false; return; }
        const spot = `${this.x(line.steps[i]).toFixed(1)},${y(value).toFixed(1)}`;
        const alone = !pen && !usable(line.values[i + 1] ?? null);
        if (alone) dots += `<circle class="run-${line.index % 6}" cx="${spot.split(",")[0]}" cy="${spot.split(",")[1]}" r="2.5"/>`;
        path += `${pen ? "L" : "M"}${spot}`;
        pen = true;
      });
      return `<path class="run-${line.index % 6}" style="fill:none" d="${path}"/>${dots}`;
    });
    this.drawing.innerHTML = `<svg viewBox="0 0 ${WIDTH} ${HEIGHT}" aria-hidden="true">${axes.join("")}`
      + `<text x="${LEFT}" y="${HEIGHT - 4}">${first}</text>`
      + `<text x="${WIDTH - 6}" y="${HEIGHT - 4}" text-anchor="end">step ${last}</text>`
      + `${paths.join("")}<line class="cursor" y1="${TOP}" y2="${HEIGHT - BOTTOM}" visibility="hidden"/></svg>`;
    this.at(this.steps.length - 1, false);
  }

  at(place, marked = true) {
    this.place = Math.min(Math.max(place, 0), this.steps.length - 1);
    const step = this.steps[this.place];
    const parts = this.lines.filter((line) => line.shown).map((line) => {
      const value = line.values[line.steps.indexOf(step)];
      return value === null || value === undefined ? null
        : (this.lines.length > 1 ? `${line.name} ` : "") + words(value);
    }).filter(Boolean);
    this.readout.textContent = `step ${step}: ${parts.join(", ") || "–"}`;
    this.drawing.setAttribute("aria-label", `${this.name}, ${this.readout.textContent}`);
    const cursor = this.drawing.querySelector(".cursor");
    cursor.setAttribute("visibility", marked ? "visible" : "hidden");
    cursor.setAttribute("x1", this.x(step));
    cursor.setAttribute("x2", this.x(step));
  }

  point(event) {
    const box = this.drawing.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * WIDTH;
    let best = 0;
    this.steps.forEach((step, i) => {
      if (Math.abs(this.x(step) - x) < Math.abs(this.x(this.steps[best]) - x)) best = i;
    });
    if (this.steps.length) this.at(best);
  }

  key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 }[event.key];
    if (!by || !this.steps.length) return;
    event.preventDefault();
    this.at(this.place + by);
  }
}

const charts = [];
for (const place of document.querySelectorAll("[data-charts]")) {
  const names = facts.curves[place.dataset.charts];
  const build = () => names.forEach((name) => charts.push(new Chart(name, place)));
  const fold = place.closest("details");
  if (fold) fold.addEventListener("toggle", () => { build(); redraw(); }, { once: true });
  else build();
}
const logarithmic = document.getElementById("logarithmic");
const toggles = [...document.querySelectorAll("[data-toggle]")];
function redraw() {
  for (const chart of charts) {
    toggles.forEach((box) => { chart.lines[Number(box.dataset.toggle)].shown = box.checked; });
    chart.draw(logarithmic.checked);
  }
}
[logarithmic, ...toggles].forEach((box) => box && box.addEventListener("change", redraw));
document.documentElement.dataset.ready = "yes";
