// Draws the map and listens; every name goes into the page as text, never as HTML.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const count = data.names.length;
const unpack = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
const points = new Uint16Array(unpack(data.points));
const labelOf = new Uint32Array(unpack(data.label));
const placeOf = new Int32Array(unpack(data.place));
const X = (i) => points[2 * i] / 65535;
const Y = (i) => points[2 * i + 1] / 65535;
const colourOf = (label) => data.colours[label % data.colours.length];

const at = (id) => document.getElementById(id);
const map = at("map");
const pen = map.getContext("2d");
const SHOWN = 200; // files in the list, and thumbnails on the map
const LABELS = 400; // labels in the legend

const view = { x: 0.5, y: 0.5, scale: 1, fit: 1 };
const isolated = new Set();
let chosen = null; // Uint8Array: what a lasso or a search found; null: nothing asked
let faded = new Uint8Array(count);
let current = -1;
let lassoing = false;
let loop = null; // corners of the lasso being drawn, on the screen

// Points by colour, so that one colour is set once.
const byColour = data.colours.map(() => []);
for (let i = 0; i < count; i++) byColour[labelOf[i] % data.colours.length].push(i);

// --- thumbnails ---------------------------------------------------------------------------------

const sheets = data.sheets.map(() => null);

function sheet(number) {
  if (!sheets[number]) {
    const image = new Image();
    image.onload = () => { image.ready = true; redraw(); drawThumbnails(); };
    image.src = "data:image/jpeg;base64," + data.sheets[number];
    sheets[number] = image;
  }
  return sheets[number];
}

// True when it is drawn; false while its sheet is on the way, or when there is none.
function thumbnail(where, i, left, top, size) {
  const place = placeOf[i];
  if (place < 0) return false;
  const each = data.columns * data.columns;
  const image = sheet(Math.floor(place / each));
  if (!image.ready) return false;
  const inside = place % each;
  const x = (inside % data.columns) * data.side;
  const y = Math.floor(inside / data.columns) * data.side;
  where.drawImage(image, x, y, data.side, data.side, left, top, size, size);
  return true;
}

function drawInto(canvas, i, size) {
  const dots = window.devicePixelRatio || 1;
  canvas.width = canvas.height = size * dots;
  canvas.style.width = canvas.style.height = size + "px";
  canvas.hidden = placeOf[i] < 0;
  thumbnail(canvas.getContext("2d"), i, 0, 0, size * dots);
}

function drawThumbnails() {
  if (current >= 0) drawInto(at("tip").firstElementChild, current, Math.max(96, data.side));
  for (const canvas of at("files").querySelectorAll("canvas")) drawInto(canvas, +canvas.dataset.i, 36);
}

// --- drawing ------------------------------------------------------------------------------------

let asked = false;
function redraw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; draw(); });
}

// The map's size is asked for once per change: asking for each of 50,000 points is slow.
const frame = { width: map.clientWidth, height: map.clientHeight };
const onScreenX = (i) => (X(i) - view.x) * view.scale + frame.width / 2;
const onScreenY = (i) => (Y(i) - view.y) * view.scale + frame.height / 2;

function draw() {
  const { width, height } = frame;
  const dots = window.devicePixelRatio || 1;
  if (map.width !== Math.round(width * dots) || map.height !== Math.round(height * dots)) {
    map.width = Math.round(width * dots);
    map.height = Math.round(height * dots);
  }
  pen.setTransform(dots, 0, 0, dots, 0, 0);
  pen.clearRect(0, 0, width, height);
  const style = getComputedStyle(document.documentElement);
  const near = Math.sqrt(view.scale / view.fit);
  const size = Math.min(16, Math.max(2.4, 160 / Math.sqrt(count)) * Math.min(3, near));
  const visible = [];
  const centreX = width / 2 - view.x * view.scale, centreY = height / 2 - view.y * view.scale;
  const step = view.scale / 65535;
  const inside = (x, y) => x > -size && y > -size && x < width + size && y < height + size;
  pen.globalAlpha = 0.3;
  pen.fillStyle = style.getPropertyValue("--line");
  for (let i = 0; i < count; i++) {
    const x = points[2 * i] * step + centreX, y = points[2 * i + 1] * step + centreY;
    if (!inside(x, y)) continue;
    if (faded[i]) pen.fillRect(x - size / 2, y - size / 2, size, size);
    else if (visible.length <= SHOWN) visible.push(i);
  }
  pen.globalAlpha = 1;
  const pictures = data.side > 0 && visible.length <= SHOWN;
  byColour.forEach((members, colour) => {
    pen.fillStyle = data.colours[colour];
    for (const i of members) {
      if (faded[i]) continue;
      const x = points[2 * i] * step + centreX, y = points[2 * i + 1] * step + centreY;
      if (inside(x, y)) mark(x, y, size);
    }
  });
  if (pictures) drawPictures(visible, width, height);
  if (current >= 0) {
    pen.lineWidth = 2.5;
    pen.strokeStyle = style.getPropertyValue("--text");
    pen.beginPath();
    pen.arc(onScreenX(current), onScreenY(current), size / 2 + 5, 0, 7);
    pen.stroke();
  }
  if (loop) {
    pen.lineWidth = 1.5;
    pen.strokeStyle = style.getPropertyValue("--text");
    pen.setLineDash([5, 4]);
    pen.beginPath();
    loop.forEach(([x, y]) => pen.lineTo(x, y));
    pen.closePath();
    pen.stroke();
    pen.setLineDash([]);
  }
}

function mark(x, y, size) {
  if (size < 5) { pen.fillRect(x - size / 2, y - size / 2, size, size); return; }
  pen.beginPath();
  pen.arc(x, y, size / 2, 0, 7);
  pen.fill();
}

// Few points are in view: they are shown as what they stand for, framed in their colour.
function drawPictures(visible, width, height) {
  const room = Math.sqrt((width * height) / Math.max(visible.length, 1)) * 0.55;
  const size = Math.round(Math.max(18, Math.min(data.side, room)));
  for (const i of visible) {
    const left = Math.round(onScreenX(i) - size / 2), top = Math.round(onScreenY(i) - size / 2);
    if (!thumbnail(pen, i, left, top, size)) continue;
    pen.lineWidth = 2;
    pen.strokeStyle = colourOf(labelOf[i]);
    pen.strokeRect(left, top, size, size);
  }
}

// --- moving -------------------------------------------------------------------------------------

function showAll() {
  view.fit = Math.max(50, Math.min(frame.width, frame.height) - 48);
  Object.assign(view, { x: 0.5, y: 0.5, scale: view.fit });
  redraw();
}

function zoom(factor, x = frame.width / 2, y = frame.height / 2) {
  const scale = Math.min(view.fit * 400, Math.max(view.fit * 0.5, view.scale * factor));
  const dx = x - frame.width / 2, dy = y - frame.height / 2;
  view.x += dx / view.scale - dx / scale;
  view.y += dy / view.scale - dy / scale;
  view.scale = scale;
  placeTip();
  redraw();
}

function pan(dx, dy) {
  view.x -= dx / view.scale;
  view.y -= dy / view.scale;
  placeTip();
  redraw();
}

function nearestTo(x, y, reach) {
  let best = -1, least = reach * reach;
  for (let i = 0; i < count; i++) {
    if (faded[i]) continue;
    const dx = onScreenX(i) - x, dy = onScreenY(i) - y, distance = dx * dx + dy * dy;
    if (distance < least) { least = distance; best = i; }
  }
  return best;
}

// The next picture that way: ahead rather than aside.
function step(dx, dy) {
  if (current < 0) return show(nearestTo(frame.width / 2, frame.height / 2, Infinity));
  let best = -1, least = Infinity;
  for (let i = 0; i < count; i++) {
    if (faded[i] || i === current) continue;
    const x = X(i) - X(current), y = Y(i) - Y(current);
    const ahead = x * dx + y * dy, aside = Math.abs(x * dy) + Math.abs(y * dx);
    const cost = ahead + 2 * aside;
    if (ahead > 0 && aside <= 1.5 * ahead && cost < least) { least = cost; best = i; }
  }
  if (best >= 0) { show(best); keepInView(); }
}

function keepInView() {
  const x = onScreenX(current), y = onScreenY(current), rim = 60;
  if (x < rim || y < rim || x > frame.width - rim || y > frame.height - rim) {
    view.x = X(current);
    view.y = Y(current);
    placeTip();
    redraw();
  }
}

// --- one picture --------------------------------------------------------------------------------

function show(i) {
  if (i === current) return;
  current = i;
  at("tip").hidden = i < 0;
  if (i >= 0) {
    at("tip-label").textContent = data.labels.length > 1 ? data.labels[labelOf[i]] : "";
    at("tip-name").textContent = data.names[i];
    drawInto(at("tip").firstElementChild, i, Math.max(96, data.side));
    map.setAttribute("aria-label", `${data.labels[labelOf[i]]}: ${data.names[i]}`);
    placeTip();
  }
  redraw();
}

function placeTip() {
  const tip = at("tip");
  if (current < 0) return;
  const x = onScreenX(current), y = onScreenY(current);
  tip.hidden = x < 0 || y < 0 || x > frame.width || y > frame.height;
  const left = x + 16 + tip.offsetWidth < frame.width ? x + 16 : x - 16 - tip.offsetWidth;
  const top = y + 16 + tip.offsetHeight < frame.height ? y + 16 : y - 16 - tip.offsetHeight;
  const within = (value, most) => Math.max(4, Math.min(value, most - 4));
  tip.style.left = within(left, frame.width - tip.offsetWidth) + "px";
  tip.style.top = within(top, frame.height - tip.offsetHeight) + "px";
}

// --- many pictures ------------------------------------------------------------------------------

function refade() {
  faded = new Uint8Array(count);
  for (let i = 0; i < count; i++) {
    faded[i] = (isolated.size && !isolated.has(labelOf[i])) || (chosen && !chosen[i]) ? 1 : 0;
  }
  if (current >= 0 && faded[current]) show(-1);
  list();
  redraw();
}

function choose(test) {
  const hidden = isolated.size ? (i) => !isolated.has(labelOf[i]) : () => false;
  chosen = new Uint8Array(count);
  for (let i = 0; i < count; i++) chosen[i] = !hidden(i) && test(i) ? 1 : 0;
  refade();
}

function clear() {
  chosen = null;
  at("search").value = "";
  show(-1);
  refade();
}

// Those that were asked for: by lasso or search, within the labels shown.
function listed() {
  const out = [];
  for (let i = 0; chosen && i < count; i++) if (!faded[i]) out.push(i);
  return out;
}

function list() {
  const rows = listed();
  at("found").hidden = !chosen;
  at("found-count").textContent = `${rows.length.toLocaleString("en")} of ${count.toLocaleString("en")} pictures`;
  at("copy").disabled = !rows.length;
  at("copy").textContent = "Copy names";
  at("files").replaceChildren(...rows.slice(0, SHOWN).map((i) => {
    const row = document.createElement("li"), button = document.createElement("button");
    const canvas = document.createElement("canvas"), name = document.createElement("span");
    canvas.dataset.i = i;
    drawInto(canvas, i, 36);
    name.textContent = data.names[i];
    button.append(canvas, name);
    button.addEventListener("click", () => { show(i); keepInView(); });
    row.append(button);
    return row;
  }));
  if (rows.length > SHOWN) {
    const rest = document.createElement("li");
    rest.textContent = `and ${(rows.length - SHOWN).toLocaleString("en")} more; all are copied`;
    at("files").append(rest);
  }
}

async function copy() {
  const text = listed().map((i) => data.names[i]).join("\n") + "\n";
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A page opened from a file may not use the clipboard directly everywhere.
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  at("copy").textContent = "Copied";
}

function chooseInView() {
  const { width, height } = frame;
  choose((i) => {
    const x = onScreenX(i), y = onScreenY(i);
    return x >= 0 && y >= 0 && x <= width && y <= height;
  });
}

function chooseInside(corners) {
  const xs = corners.map(([x]) => x), ys = corners.map(([, y]) => y);
  const left = Math.min(...xs), right = Math.max(...xs);
  const top = Math.min(...ys), bottom = Math.max(...ys);
  choose((i) => {
    const x = onScreenX(i), y = onScreenY(i);
    if (x < left || x > right || y < top || y > bottom) return false;
    let inside = false;
    for (let a = 0, b = corners.length - 1; a < corners.length; b = a++) {
      const [ax, ay] = corners[a], [bx, by] = corners[b];
      if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) inside = !inside;
    }
    return inside;
  });
}

function search() {
  const wanted = at("search").value.trim().toLowerCase();
  if (!wanted) return clear();
  const labels = data.labels.map((label) => label.toLowerCase().includes(wanted));
  choose((i) => labels[labelOf[i]] || data.names[i].toLowerCase().includes(wanted));
}

// --- labels -------------------------------------------------------------------------------------

function fillLegend() {
  const shown = data.labels.slice(0, LABELS);
  const rest = data.labels.length - shown.length;
  at("labels-count").textContent = `${data.labels.length.toLocaleString("en")} labels`
    + (data.labels.length > data.colours.length ? `; colours repeat after ${data.colours.length}` : "")
    + (rest ? `; the ${LABELS} largest` : "");
  at("legend").append(...shown.map((label, code) => {
    const row = document.createElement("li"), button = document.createElement("button");
    const dot = document.createElement("i"), name = document.createElement("span");
    const number = document.createElement("small");
    dot.style.background = colourOf(code);
    name.textContent = label;
    number.textContent = data.counts[code].toLocaleString("en");
    button.append(dot, name, number);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      if (!isolated.delete(code)) isolated.add(code);
      button.setAttribute("aria-pressed", String(isolated.has(code)));
      at("every").hidden = !isolated.size;
      refade();
    });
    row.append(button);
    return row;
  }));
}

function showEvery() {
  isolated.clear();
  for (const button of at("legend").querySelectorAll("button")) button.setAttribute("aria-pressed", "false");
  at("every").hidden = true;
  refade();
}

// --- hands --------------------------------------------------------------------------------------

const down = new Map(); // pointers that are down: where they are
let moved = 0;
const place = (event) => {
  const box = map.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};

map.addEventListener("pointerdown", (event) => {
  map.setPointerCapture(event.pointerId);
  down.set(event.pointerId, place(event));
  moved = 0;
  loop = down.size === 1 && (lassoing || event.shiftKey) ? [place(event)] : null;
});

map.addEventListener("pointermove", (event) => {
  const [x, y] = place(event);
  if (!down.has(event.pointerId)) {
    if (event.pointerType === "mouse") show(nearestTo(x, y, 16));
    return;
  }
  const [wasX, wasY] = down.get(event.pointerId);
  moved += Math.hypot(x - wasX, y - wasY);
  if (down.size === 2) {
    const [other] = [...down].filter(([id]) => id !== event.pointerId).map(([, where]) => where);
    const before = Math.hypot(wasX - other[0], wasY - other[1]);
    const after = Math.hypot(x - other[0], y - other[1]);
    if (before > 0) zoom(after / before, (x + other[0]) / 2, (y + other[1]) / 2);
    pan((x - wasX) / 2, (y - wasY) / 2);
  } else if (loop) {
    loop.push([x, y]);
    redraw();
  } else if (down.size === 1) {
    pan(x - wasX, y - wasY);
  }
  down.set(event.pointerId, [x, y]);
});

function lift(event) {
  if (!down.delete(event.pointerId)) return;
  if (event.type === "pointerup" && moved < 6) show(nearestTo(...place(event), event.pointerType === "mouse" ? 16 : 28));
  else if (event.type === "pointerup" && loop && loop.length > 2) chooseInside(loop);
  loop = null;
  redraw();
}
map.addEventListener("pointerup", lift);
map.addEventListener("pointercancel", lift);
map.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * (event.deltaMode === 1 ? 0.05 : 0.0015)), ...place(event));
}, { passive: false });

map.addEventListener("keydown", (event) => {
  const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  const act = { "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: showAll, v: chooseInView, Escape: clear }[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey || !(way || act)) return;
  event.preventDefault();
  if (way) step(...way);
  else act();
});

at("lasso").addEventListener("click", () => {
  lassoing = !lassoing;
  at("lasso").setAttribute("aria-pressed", String(lassoing));
});
at("in-view").addEventListener("click", chooseInView);
at("nearer").addEventListener("click", () => zoom(1.5));
at("farther").addEventListener("click", () => zoom(1 / 1.5));
at("all").addEventListener("click", showAll);
at("copy").addEventListener("click", copy);
at("clear").addEventListener("click", clear);
at("every").addEventListener("click", showEvery);
let waiting = 0;
at("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 120); });

let wide = 0;
new ResizeObserver(() => {
  Object.assign(frame, { width: map.clientWidth, height: map.clientHeight });
  if (!wide || view.scale === view.fit) showAll();
  wide = frame.width;
  placeTip();
  redraw();
}).observe(map);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
fillLegend();
