// The parts of the page. Each `make...` builds one and returns what moves it to another stop of the slider, or nothing.

const percent = (value) => 100 * value;
const short = (value) => String(Number(value.toPrecision(4)));

// ---- curves

function bar(parent, colour, x1, y1, x2, y2) {
  return add(parent, "line", {class: `bar-line stroke ${colour}`, x1, y1, x2, y2});
}

// Confidence intervals of one point in the plane: along SA and along RA.
function planeBars(parent, plot, p, colour) {
  const x = plot.toX(percent(p.sa)), y = plot.toY(percent(p.ra)), ends = (ci, scale) => ci.map((v) => scale(percent(v)));
  if (p.sa_ci) { const [low, high] = ends(p.sa_ci, plot.toX); bar(parent, colour, low, y, high, y); }
  if (p.ra_ci) { const [low, high] = ends(p.ra_ci, plot.toY); bar(parent, colour, x, low, x, high); }
}

function drawLine(plot, pairs, run, {hollow = false, dash = run.dash} = {}) {
  add(plot.root, "path", {class: `curve stroke ${run.colour}`, d: path(pairs, plot), "stroke-dasharray": dash});
  for (const [x, y] of pairs) drawMark(plot.root, run.mark, plot.toX(x), plot.toY(y), 4.5, `${hollow ? "hollow" : "fill"} ${run.colour}`);
}

function hitTarget(plot, x, y, point, run, go) {
  const target = add(plot.root, "circle", {class: "hit", cx: plot.toX(x), cy: plot.toY(y), r: 12});
  add(target, "title", {}, `${run.label}, lambda ${point.lam_text}: SA ${point.sa_text}, RA ${point.ra_text}`);
  target.addEventListener("click", () => go(point.lam));
}

// Moves an element smoothly, but puts it where it first belongs at once.
function glide(element) {
  let isPlaced = false;
  return (x, y) => {
    element.style.transform = `translate(${x}px, ${y}px)`;
    if (!isPlaced && getComputedStyle(element).transform) element.classList.add("glide");
    isPlaced = true;
  };
}

// A ring around the chosen point of a run; its position is in percent, null where there is none.
function follower(plot, run, r = 9, flag = false) {
  const group = add(plot.root, "g", {class: `follow ${run.colour}`});
  const text = flag && add(group, "text", {class: "flag", x: r + 6, y: -r - 3});
  add(group, "circle", {class: "halo fill", r: r + 7});
  add(group, "circle", {class: "ring stroke", r});
  const place = glide(group);
  return (x, y, lam = "") => {
    if (text) text.textContent = lam;
    group.style.display = x === null ? "none" : "";
    if (x !== null) place(plot.toX(x), plot.toY(y));
  };
}

function extent(points, key) {
  return points.flatMap((p) => [p[key], ...(p[`${key}_ci`] || [])]).map(percent);
}

function makePlane(host, page, go) {
  const all = [...page.runs, ...page.dedicated].flatMap((each) => each.points);
  const plot = axes(host, {height: 380, x: {domain: spread(extent(all, "sa"), .08, [0, 100]), title: "SA", format: short},
    y: {domain: spread(extent(all, "ra"), .08, [0, 100]), format: short}, label: "Robust accuracy over standard accuracy; the table below has every number"});
  add(plot.root, "text", {class: "title", x: 12, y: plot.top + 4, "text-anchor": "middle"}, "RA");
  for (const dedicated of page.dedicated) drawDedicated(plot, dedicated);
  for (const run of page.runs) {
    for (const p of run.points) planeBars(plot.root, plot, p, run.colour);
    drawLine(plot, run.points.map((p) => [percent(p.sa), percent(p.ra)]), run);
  }
  for (const run of page.runs) for (const p of run.points) hitTarget(plot, percent(p.sa), percent(p.ra), p, run, go);
  const strong = add(plot.root, "g", {class: "strong"});
  const movers = page.runs.map((run) => follower(plot, run, 9, true));
  return (lam) => {
    strong.replaceChildren();
    page.runs.forEach((run, i) => {
      const p = run.at.get(lam);
      if (p) planeBars(strong, plot, p, run.colour);
      movers[i](p ? percent(p.sa) : null, p ? percent(p.ra) : null, p && `\u03bb ${p.lam_text}`);
    });
  };
}

function drawDedicated(plot, {points, front}) {
  for (const p of points) planeBars(plot.root, plot, p, "ink");
  const steps = front.map((p) => [percent(p.sa), percent(p.ra)]);
  // To the axes, so that a front of one point is seen too.
  const corners = [[plot.x.domain[0], steps[0][1]]];
  steps.forEach(([sa, ra], i) => corners.push(...(i ? [[steps[i - 1][0], ra]] : []), [sa, ra]));
  corners.push([steps[steps.length - 1][0], plot.y.domain[0]]);
  add(plot.root, "path", {class: "front", d: path(corners, plot)});
  const taken = [];
  for (const p of points) {
    const x = plot.toX(percent(p.sa)), y = plot.toY(percent(p.ra));
    drawMark(plot.root, "diamond", x, y, 5, "hollow ink");
    if (taken.some(([tx, ty]) => Math.abs(tx - x) < 24 && Math.abs(ty - y) < 13)) continue;
    taken.push([x, y]);
    const below = y + 15 > plot.height - plot.bottom ? -8 : 15;
    add(plot.root, "text", {x: x - 9, y: y + below, "text-anchor": "end"}, p.lam_text);
  }
}

function makeOver(host, page, go) {
  const lambdas = page.stops, values = page.runs.flatMap((run) => [...extent(run.points, "sa"), ...extent(run.points, "ra")]);
  const domain = lambdas.length > 1 ? [lambdas[0], lambdas[lambdas.length - 1]] : spread(lambdas, 0);
  const plot = axes(host, {height: 380, x: {domain: spread(domain, .02), ticks: niceTicks(...domain, 5), title: "lambda", format: short},
    y: {domain: spread(values, .06, [0, 100]), format: short}, right: 34, label: "SA and RA over lambda; the table below has every number"});
  const rule = add(plot.root, "line", {class: "axis", y1: plot.top, y2: plot.height - plot.bottom, "stroke-dasharray": "3 3"});
  const movers = [], slide = glide(rule);
  for (const key of ["sa", "ra"]) for (const run of page.runs) {
    for (const {lam, [`${key}_ci`]: ci} of run.points) {
      if (ci) bar(plot.root, run.colour, plot.toX(lam), plot.toY(percent(ci[0])), plot.toX(lam), plot.toY(percent(ci[1])));
    }
    drawLine(plot, run.points.map((p) => [p.lam, percent(p[key])]), run, {hollow: key === "ra", dash: key === "ra" ? "6 4" : ""});
    movers.push([run, key, follower(plot, run, 8)]);
  }
  for (const run of page.runs) for (const p of run.points) for (const key of ["sa", "ra"]) hitTarget(plot, p.lam, percent(p[key]), p, run, go);
  for (const key of ["sa", "ra"]) {
    const last = page.runs[0].points[page.runs[0].points.length - 1];
    add(plot.root, "text", {class: "name", x: plot.toX(last.lam) + 10, y: plot.toY(percent(last[key])) + 4}, key.toUpperCase());
  }
  return (lam) => {
    slide(plot.toX(lam), 0);
    for (const [run, key, move] of movers) {
      const p = run.at.get(lam);
      move(p ? lam : null, p ? percent(p[key]) : null);
    }
  };
}

function makeLegend(host, page) {
  const entry = (options, text) => { const span = add(host, "span"); swatch(span, options); span.append(text); };
  for (const run of page.runs) entry(run, run.label + (run.ratio ? ` (frontier ratio ${run.ratio})` : ""));
  for (const {seeds} of page.dedicated) entry({colour: "ink", mark: "diamond", dash: "2 4", hollow: true}, `dedicated networks, one per lambda${seeds > 1 ? `, means of ${seeds} seeds` : ""}, and their front`);
}

// ---- one run at one lambda

function makeReadout(host, run) {
  const who = add(host, "div", {class: "who"});
  swatch(who, run);
  add(who, "span", {title: run.label}, run.label);
  const cells = ["SA", "RA"].map((name) => { const cell = add(host, "div"); cell.append(`${name} `); return add(cell, "b"); });
  return (lam) => {
    const p = run.at.get(lam);
    cells[0].textContent = p ? p.sa_text.split(" ")[0] : "–";
    cells[1].textContent = p ? p.ra_text.split(" ")[0] : "–";
  };
}

function runHead(host, run) {
  const head = add(host, "div", {class: "run-head"});
  swatch(head, run);
  add(head, "h3", {}, run.label);
}

function makeNow(host, run) {
  const card = add(host, "article", {class: "card run"});
  runHead(card, run);
  const missing = add(card, "p", {class: "note"}, "Not measured at this lambda.");
  const body = add(card, "div", {class: "inside"});
  const left = add(body, "div");
  const big = add(left, "div", {class: "big"});
  const numbers = [["SA", "correct on clean images", "sa_text"], ["RA", "correct under attack", "ra_text"],
    ["RA, worst lambda", "whichever lambda the attack goes through", "ra_worst_text"]]
    .filter(([, , key]) => run.points.some((p) => key in p))
    .map(([name, about, key]) => {
      const box = add(big, "div", {"data-key": key});
      add(box, "span", {}, `${name} %`);
      const value = add(box, "b"), interval = add(box, "span", {class: "interval"});
      add(box, "span", {}, about);
      return [key, value, interval];
    });
  const movers = [makeClasses(left, run), makeGallery(body, run)];
  return (lam) => {
    const p = run.at.get(lam);
    missing.hidden = Boolean(p);
    body.hidden = !p;
    if (!p) return;
    for (const [key, value, interval] of numbers) {
      const [number, ...rest] = (p[key] || "–").split(" ");
      value.textContent = number;
      interval.textContent = rest.join(" ");
    }
    for (const move of movers) move(run.points.indexOf(p));
  };
}

function makeClasses(host, run) {
  const {per_class: found, classes} = run;
  const box = add(host, "div", {class: "classes"});
  const table = add(box, "table");
  add(table, "caption", {}, `Every class, percent: SA light, RA dark; n = ${found.num_examples}` +
    (found.again ? ", measured for this page (the run kept no outcome of every image)" : ""));
  const head = add(add(table, "thead"), "tr");
  for (const [name, style] of [["class", "name"], ["SA", "num"], ["RA", "num"], ["", "bars"]]) add(head, "th", {scope: "col", class: style}, name);
  const body = add(table, "tbody");
  const rows = classes.map((name, k) => {
    const row = add(body, "tr");
    add(row, "th", {scope: "row", title: `${name}: ${found.counts[k]} images`}, name);
    const cells = [add(row, "td", {class: "num"}), add(row, "td", {class: "num"})];
    const beam = add(add(row, "td", {class: "bars", "aria-hidden": "true"}), "span", {class: `beam ${run.colour}`});
    return {cells, bars: [add(beam, "i", {class: "light"}), add(beam, "i")]};
  });
  return (at) => rows.forEach(({cells, bars}, k) => ["sa", "ra"].forEach((key, i) => {
    const value = found[key][at][k];
    cells[i].textContent = value === null ? "–" : percent(value).toFixed(0);
    bars[i].style.width = `${value === null ? 0 : percent(value)}%`;
  }));
}

function makeGallery(host, run) {
  const {gallery, classes} = run;
  const box = add(host, "div");
  add(box, "p", {class: "note"}, `Test images, the first of every class in turn: clean, attacked (${run.attack}), and their difference, ${Number(gallery.gain.toPrecision(3))} times as strong, around grey.`);
  const pictures = add(box, "div", {class: "pictures"});
  const cards = gallery.index.map((index, n) => {
    const card = add(pictures, "div", {class: "picture"});
    add(card, "p", {}, `image ${index}, truly ${classes[gallery.label[n]]}`);
    const trio = add(card, "div", {class: "trio"});
    const [clean, attacked, difference] = ["clean", "attacked", "difference"].map((name) => {
      const figure = add(trio, "figure");
      const canvas = add(figure, "canvas", {width: gallery.width, height: gallery.height, role: "img"});
      const caption = add(figure, "figcaption");
      return {name, canvas, answer: add(caption, "b"), more: add(caption, "span")};
    });
    difference.more.textContent = "difference";
    difference.canvas.setAttribute("aria-label", `image ${index}, difference`);
    return {index, clean, attacked, difference};
  });
  const say = (spot, said, at, n, index) => {
    const answer = said.answer[at][n], isRight = answer === gallery.label[n];
    const confidence = `${percent(said.confidence[at][n]).toFixed(0)}%`;
    spot.answer.textContent = classes[answer];
    spot.answer.className = isRight ? "right" : "wrong";
    spot.more.textContent = `${spot.name} ${confidence}`;
    spot.canvas.setAttribute("aria-label", `image ${index} ${spot.name}: answer ${classes[answer]}, ${isRight ? "right" : "wrong"}, confidence ${confidence}`);
  };
  return (at) => cards.forEach(({index, clean, attacked, difference}, n) => {
    say(clean, gallery.clean, at, n, index);
    say(attacked, gallery.attacked, at, n, index);
    run.sheet.draw(clean.canvas, n, 0);
    run.sheet.draw(attacked.canvas, n, at + 1);
    run.sheet.drawDifference(difference.canvas, n, at + 1);
  });
}

// The tiles of a gallery: one picture, whose first row is clean and whose others are attacked, one row per lambda.
class Sheet {
  constructor({sheet, width, height, gain}) {
    Object.assign(this, {url: sheet, width, height, gain});
  }

  async load() {
    const image = new Image();
    image.src = this.url;
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = image.width;
    canvas.height = image.height;
    this.context = canvas.getContext("2d", {willReadFrequently: true});
    this.context.drawImage(image, 0, 0);
  }

  tile(column, row) {
    return this.context.getImageData(column * this.width, row * this.height, this.width, this.height);
  }

  draw(canvas, column, row) {
    canvas.getContext("2d").putImageData(this.tile(column, row), 0, 0);
  }

  drawDifference(canvas, column, row) {
    const clean = this.tile(column, 0).data, result = this.tile(column, row), data = result.data;
    for (let i = 0; i < data.length; i += 1) if (i % 4 < 3) data[i] = 127.5 + (data[i] - clean[i]) * this.gain;
    canvas.getContext("2d").putImageData(result, 0, 0);
  }
}

// ---- matrices, training, table, origin

function makeMatrix(host, run, matrix, title) {
  const card = add(host, "div", {class: "card scroll"});
  runHead(card, run);
  const table = add(card, "table", {class: "heat"});
  add(table, "caption", {}, `${title}, n = ${matrix.num_examples}`);
  const top = add(add(table, "thead"), "tr");
  add(top, "td");
  const heads = matrix.lambdas_texts.map((text) => add(top, "th", {scope: "col"}, text));
  const values = matrix.ra.flat(), low = Math.min(...values), high = Math.max(...values);
  const body = add(table, "tbody");
  const rows = matrix.ra.map((row, r) => {
    const line = add(body, "tr");
    add(line, "th", {scope: "row"}, matrix.attack_lambdas_texts[r]);
    return row.map((value, c) => {
      const share = Math.round(percent(high > low ? (value - low) / (high - low) : .5));
      const cell = add(line, "td", {}, matrix.ra_texts[r][c]);
      cell.style.background = `color-mix(in srgb, var(--heat-high) ${share}%, var(--heat-low))`;
      cell.style.color = share > 48 ? "var(--card)" : "var(--ink)";
      return cell;
    });
  });
  return (lam) => [heads, ...rows].forEach((line) => line.forEach((cell, c) => cell.classList.toggle("here", matrix.lambdas[c] === lam)));
}

function drawTraining(host, run) {
  host.replaceChildren();
  runHead(host, run);
  if (!run.training.length) add(host, "p", {class: "note"}, "No steps were logged.");
  const panels = add(host, "div", {class: "panels"});
  // All places first: how wide one is depends on how many there are.
  const places = run.training.map((panel) => {
    const box = add(panels, "div"), title = add(box, "p", {class: "note"}, panel.title);
    panel.series.forEach((series, i) => {
      if (panel.series.length === 1) return;
      const key = add(title, "span");
      key.append("  ");
      swatch(key, {colour: run.colour, dash: DASHES[i]});
      key.append(` ${series.name}`);
    });
    return add(box, "div", {class: "plot"});
  });
  run.training.forEach((panel, at) => {
    const all = panel.series.flatMap((series) => series.points);
    const plot = axes(places[at], {
      height: 170, label: `${run.label}: ${panel.title} over steps`,
      x: {domain: spread(all.map((p) => p[0]), 0)}, y: {domain: spread(all.map((p) => p[1]), .08), format: short},
    });
    panel.series.forEach((series, i) => {
      const attributes = {class: `curve stroke ${run.colour}`, d: path(series.points, plot), "stroke-dasharray": DASHES[i]};
      add(plot.root, "path", attributes);
    });
  });
}

function makeTable(host, page) {
  const table = add(host, "table");
  const hasWorst = page.runs.some((run) => run.reports.some((report) => report.points.some((p) => "ra_worst" in p)));
  const head = add(add(table, "thead"), "tr");
  for (const name of ["lambda", "SA %", "RA %", ...(hasWorst ? ["RA %, worst lambda"] : [])]) add(head, "th", {scope: "col"}, name);
  const rows = [];
  for (const run of page.runs) for (const report of run.reports) {
    const body = add(table, "tbody");
    const group = add(add(body, "tr", {class: "group"}), "th", {scope: "rowgroup", colspan: hasWorst ? 4 : 3}, `${run.label} `);
    add(group, "span", {}, `${report.dataset} ${report.split}, n = ${report.num_examples}; ${report.attack}; ${report.file}`);
    for (const p of report.points) {
      const row = add(body, "tr");
      for (const text of [p.lam_text, p.sa_text, p.ra_text, ...(hasWorst ? [p.ra_worst_text || ""] : [])]) add(row, "td", {}, text);
      rows.push([row, p.lam]);
    }
  }
  return (lam) => rows.forEach(([row, its]) => row.classList.toggle("here", its === lam));
}

function csv(page) {
  const keys = ["sa", "ra", "ra_worst"];
  const lines = [["run", "report", "attack", "dataset", "split", "num_examples", "lambda", ...keys.flatMap((k) => [k, `${k}_low`, `${k}_high`])]];
  for (const run of page.runs) for (const report of run.reports) for (const p of report.points) {
    const values = keys.flatMap((k) => [p[k], ...(p[`${k}_ci`] || [undefined, undefined])]);
    lines.push([run.label, report.file, report.attack, report.dataset, report.split, report.num_examples, p.lam === null ? p.lam_text : p.lam, ...values]);
  }
  const quote = (value) => { const text = value === undefined ? "" : String(value); return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text; };
  return lines.map((line) => line.map(quote).join(",")).join("\n") + "\n";
}

function pairs(host, rows, caption) {
  const details = add(host, "details");
  add(details, "summary", {}, caption);
  const body = add(add(details, "table", {class: "pairs"}), "tbody");
  for (const [key, value] of rows) {
    const row = add(body, "tr");
    add(row, "th", {scope: "row"}, key);
    add(row, "td", {}, value);
  }
}

function makeOrigin(host, run) {
  const card = add(host, "div", {class: "card"});
  runHead(card, run);
  const known = new Map(run.provenance);
  for (const [name, key] of [["command", "command"], ["commit", "commit"], ["started", "started"], ["ranks", "ranks"]]) {
    if (known.has(key)) add(card, "p", {class: "note"}, `${name}: ${known.get(key)}`);
  }
  add(card, "p", {class: "note"}, `folder: ${run.folder}`);
  pairs(card, run.settings, "Configuration");
  pairs(card, run.provenance, "Provenance");
}

function makeDifferences(host, page) {
  if (!page.differences.length) return;
  const card = add(host, "div", {class: "card scroll"});
  const table = add(card, "table", {class: "pairs"});
  add(table, "caption", {}, "Settings in which the runs differ");
  const head = add(add(table, "thead"), "tr");
  for (const name of ["", ...page.runs.map((run) => run.label)]) add(head, "th", {scope: "col"}, name);
  const body = add(table, "tbody");
  for (const {key, values} of page.differences) {
    const row = add(body, "tr");
    add(row, "th", {scope: "row"}, key);
    for (const value of values) add(row, "td", {}, value);
  }
}
