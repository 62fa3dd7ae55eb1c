// Figures: the plane of SA and RA, both over lambda, and training.

function bar(parent, colour, x1, y1, x2, y2) {
  return add(parent, "line", {class: `bar-line stroke ${colour}`, x1, y1, x2, y2});
}

// Confidence intervals of one point in the plane: along SA and along RA.
function planeBars(parent, plot, p, colour) {
  const x = plot.toX(percent(p.sa)), y = plot.toY(percent(p.ra));
  const ends = (ci, scale) => ci.map((v) => scale(percent(v)));
  if (p.sa_ci) { const [low, high] = ends(p.sa_ci, plot.toX); bar(parent, colour, low, y, high, y); }
  if (p.ra_ci) { const [low, high] = ends(p.ra_ci, plot.toY); bar(parent, colour, x, low, x, high); }
}

function drawLine(plot, pairs, run, {hollow = false, dash = run.dash} = {}) {
  add(plot.root, "path", {class: `curve stroke ${run.colour}`, d: path(pairs, plot), "stroke-dasharray": dash});
  const style = `${hollow ? "hollow" : "fill"} ${run.colour}`;
  for (const [x, y] of pairs) drawMark(plot.root, run.mark, plot.toX(x), plot.toY(y), 4.5, style);
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
  const plot = axes(host, {
    height: 380, label: "Robust accuracy over standard accuracy; the table below has every number",
    x: {domain: spread(extent(all, "sa"), .08, [0, 100]), title: "SA", format: short},
    y: {domain: spread(extent(all, "ra"), .08, [0, 100]), format: short},
  });
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
  const lambdas = page.stops, points = page.runs.flatMap((run) => run.points);
  const values = [...extent(points, "sa"), ...extent(points, "ra")];
  const domain = lambdas.length > 1 ? [lambdas[0], lambdas[lambdas.length - 1]] : spread(lambdas, 0);
  const plot = axes(host, {
    height: 380, right: 34, label: "SA and RA over lambda; the table below has every number",
    x: {domain: spread(domain, .02), ticks: niceTicks(...domain, 5), title: "lambda", format: short},
    y: {domain: spread(values, .06, [0, 100]), format: short},
  });
  const ends = {y1: plot.top, y2: plot.height - plot.bottom};
  const rule = add(plot.root, "line", {class: "axis", ...ends, "stroke-dasharray": "3 3"});
  const movers = [], slide = glide(rule);
  for (const key of ["sa", "ra"]) for (const run of page.runs) {
    for (const {lam, [`${key}_ci`]: ci} of run.points) {
      const [low, high] = (ci || []).map((v) => plot.toY(percent(v))), x = plot.toX(lam);
      if (ci) bar(plot.root, run.colour, x, low, x, high);
    }
    const look = key === "ra" ? {hollow: true, dash: "6 4"} : {dash: ""};
    drawLine(plot, run.points.map((p) => [p.lam, percent(p[key])]), run, look);
    movers.push([run, key, follower(plot, run, 8)]);
  }
  const last = page.runs[0].points[page.runs[0].points.length - 1];
  for (const key of ["sa", "ra"]) {
    for (const run of page.runs) for (const p of run.points) hitTarget(plot, p.lam, percent(p[key]), p, run, go);
    const beside = {x: plot.toX(last.lam) + 10, y: plot.toY(percent(last[key])) + 4};
    add(plot.root, "text", {class: "name", ...beside}, key.toUpperCase());
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
  for (const {seeds} of page.dedicated) {
    const means = seeds > 1 ? `, means of ${seeds} seeds` : "";
    entry({colour: "ink", mark: "diamond", dash: "2 4", hollow: true}, `dedicated networks, one per lambda${means}, and their front`);
  }
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
      const d = path(series.points, plot);
      add(plot.root, "path", {class: `curve stroke ${run.colour}`, d, "stroke-dasharray": DASHES[i]});
    });
  });
}
