"use strict";
// Drawing: elements, scales, axes, markers. Text only ever becomes text, never markup.

function add(parent, name, attributes = {}, text = null) {
  const isSvg = name === "svg" || parent.namespaceURI === "http://www.w3.org/2000/svg";
  const element = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  parent.append(element);
  return element;
}

const NUM_COLOURS = 6;
const MARKS = ["circle", "square", "triangle", "nabla", "plus", "hexagon", "star"];
const DASHES = ["", "8 4", "2 3", "10 3 2 3", "5 2", "1 4", "12 4"];

function outline(kind, r) {
  const corner = ([x, y]) => `${(x * r).toFixed(2)},${(y * r).toFixed(2)}`;
  const polygon = (corners) => `M${corners.map(corner).join("L")}Z`;
  const around = (n, turn, inner = 1) => Array.from({length: n}, (_, i) => {
    const angle = turn + i * 2 * Math.PI / n, size = i % 2 ? inner : 1;
    return [1.15 * size * Math.cos(angle), 1.15 * size * Math.sin(angle)];
  });
  switch (kind) {
    case "square": return polygon([[-.9, -.9], [.9, -.9], [.9, .9], [-.9, .9]]);
    case "triangle": return polygon([[0, -1.2], [1.15, .85], [-1.15, .85]]);
    case "nabla": return polygon([[0, 1.2], [1.15, -.85], [-1.15, -.85]]);
    case "diamond": return polygon([[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]]);
    case "hexagon": return polygon(around(6, 0));
    case "star": return polygon(around(10, -Math.PI / 2, .5));
    case "plus": return polygon([[-.4, -1.1], [.4, -1.1], [.4, -.4], [1.1, -.4], [1.1, .4], [.4, .4], [.4, 1.1],
      [-.4, 1.1], [-.4, .4], [-1.1, .4], [-1.1, -.4], [-.4, -.4]]);
    default: return `M${-r},0A${r},${r} 0 1 1 ${r},0A${r},${r} 0 1 1 ${-r},0Z`;
  }
}

function niceTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * .999);
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return Array.from({length: last - first + 1}, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function spread(values, share, within = [-Infinity, Infinity]) {
  let low = Math.min(...values), high = Math.max(...values);
  const margin = (high - low) * share || Math.abs(high) * .05 || 1;
  low = Math.max(within[0], low - margin);
  high = Math.min(within[1], high + margin);
  return low < high ? [low, high] : [low - 1, high + 1];
}

// Axes in a host element, at its real width, so that text has the size it says. Returns scales and layers.
function axes(host, {x, y, height, label, right = 14}) {
  host.replaceChildren();
  const width = Math.max(240, host.clientWidth), left = 48, top = 12, bottom = 42;
  const root = add(host, "svg", {viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label});
  const toX = (v) => left + (v - x.domain[0]) / (x.domain[1] - x.domain[0]) * (width - left - right);
  const toY = (v) => height - bottom - (v - y.domain[0]) / (y.domain[1] - y.domain[0]) * (height - top - bottom);
  for (const tick of x.ticks || niceTicks(...x.domain, Math.max(3, width / 90))) {
    add(root, "line", {class: "grid", x1: toX(tick), x2: toX(tick), y1: top, y2: height - bottom});
    add(root, "text", {x: toX(tick), y: height - bottom + 17, "text-anchor": "middle"}, (x.format || String)(tick));
  }
  for (const tick of niceTicks(...y.domain, height / 60)) {
    add(root, "line", {class: "grid", x1: left, x2: width - right, y1: toY(tick), y2: toY(tick)});
    add(root, "text", {x: left - 8, y: toY(tick) + 4, "text-anchor": "end"}, (y.format || String)(tick));
  }
  add(root, "line", {class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom});
  const under = {class: "title", x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle"};
  if (x.title) add(root, "text", under, x.title);
  return {root, x, y, toX, toY, width, height, left, right, top, bottom};
}

function path(points, {toX, toY}) {
  return points.map(([px, py], i) => `${i ? "L" : "M"}${toX(px).toFixed(1)},${toY(py).toFixed(1)}`).join("");
}

function drawMark(parent, kind, x, y, r, style) {
  const transform = `translate(${x.toFixed(1)},${y.toFixed(1)})`;
  return add(parent, "path", {d: outline(kind, r), transform, class: style});
}

function swatch(parent, {colour, mark, dash, hollow = false}) {
  const root = add(parent, "svg", {width: 34, height: 14, viewBox: "0 0 34 14", "aria-hidden": "true", class: colour});
  add(root, "line", {x1: 1, x2: 33, y1: 7, y2: 7, class: "stroke", "stroke-width": 2, "stroke-dasharray": dash});
  if (mark) drawMark(root, mark, 17, 7, 4.5, hollow ? "hollow" : "fill");
  return root;
}

const percent = (value) => 100 * value;
const short = (value) => String(Number(value.toPrecision(4)));

// In what follows, a function `make...` builds a part of the page and returns what moves it to another lambda.
