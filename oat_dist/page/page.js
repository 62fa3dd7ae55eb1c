// Puts the page together and moves it with the slider.

(async () => {
  const page = JSON.parse(document.getElementById("values").textContent);
  const spot = (id) => document.getElementById(id);
  page.stops = [...new Set(page.runs.flatMap((run) => run.points.map((p) => p.lam)))].sort((a, b) => a - b);
  const texts = new Map(page.runs.flatMap((run) => run.points.map((p) => [p.lam, p.lam_text])));
  page.runs.forEach((run, i) => Object.assign(run, {
    colour: `s${i % NUM_COLOURS}`, mark: MARKS[i % MARKS.length], dash: DASHES[i % DASHES.length],
    at: new Map(run.points.map((p) => [p.lam, p])), sheet: new Sheet(run.gallery),
  }));
  if (page.runs.length === 1) spot("now").classList.add("alone");

  const slider = spot("lambda");
  slider.max = page.stops.length - 1;
  const asked = page.stops.indexOf(Number(location.hash.slice(1) || NaN));
  slider.value = asked >= 0 ? asked : Math.min(1, page.stops.length - 1);
  const go = (lam) => { slider.value = page.stops.indexOf(lam); move(); };

  const measured = (run) => `${run.model} on ${run.dataset} ${run.split}, n = ${run.num_examples}; ${run.attack}`;
  const abouts = new Set(page.runs.map(measured));
  spot("about").textContent = (abouts.size > 1 ? "Not measured alike: " : "") + [...abouts].join(" · ");
  const hasIntervals = page.runs.some((run) => run.points.some((p) => "sa_ci" in p));
  spot("curves-note").textContent = (hasIntervals ? "Bars are 95% confidence intervals over images. " : "") +
    "Filled: SA, dashed and hollow: RA, in the right figure. Click a point to go to its lambda.";
  for (const run of page.runs) for (const note of run.notes) add(spot("notes"), "p", {}, `${run.label}: ${note}`);
  spot("notes").hidden = !page.runs.some((run) => run.notes.length);
  spot("made").textContent = `Made ${page.made}.`;

  // Ticks of the slider: as many labels as there is room for, both ends always.
  const every = Math.ceil(page.stops.length / 11), last = page.stops.length - 1;
  const ticks = page.stops.flatMap((lam, i) => {
    if (i !== last && (i % every || last - i < every / 2)) return [];
    const tick = add(spot("ticks"), "span", {}, texts.get(lam));
    tick.style.left = `${last ? 100 * i / last : 50}%`;
    return [[tick, lam]];
  });

  makeLegend(spot("legend"), page);
  makeDifferences(spot("differences"), page);
  const movers = [makeTable(spot("table"), page)];
  const trainings = page.runs.map((run) => [add(spot("training"), "div", {class: "card"}), run]);
  for (const run of page.runs) {
    movers.push(makeReadout(spot("readouts"), run), makeNow(spot("now"), run));
    for (const matrix of run.matrices) movers.push(makeMatrix(spot("matrix-columns"), run, matrix));
    makeOrigin(spot("origin"), run);
  }
  spot("matrices").hidden = !page.runs.some((run) => run.matrices.length);

  let plots = [];
  const draw = () => {
    plots = [makePlane(spot("plane"), page, go), makeOver(spot("over"), page, go)];
    for (const [host, run] of trainings) drawTraining(host, run);
    for (const plot of plots) plot(page.stops[slider.value]);
  };
  const move = () => {
    const lam = page.stops[slider.value], text = texts.get(lam);
    spot("chosen").textContent = spot("now-lambda").textContent = text;
    slider.setAttribute("aria-valuetext", `lambda ${text}`);
    for (const [tick, its] of ticks) tick.classList.toggle("here", its === lam);
    for (const each of [...movers, ...plots]) each(lam);
    const speak = (run, p) => `${run.label} at lambda ${text}: SA ${p.sa_text} percent, RA ${p.ra_text} percent`;
    spot("spoken").textContent = page.runs.filter((run) => run.at.has(lam)).map((run) => speak(run, run.at.get(lam))).join("; ");
  };

  spot("csv").value = csv(page);
  spot("copy").addEventListener("click", async () => {
    const area = spot("csv");
    try {
      await navigator.clipboard.writeText(area.value);
      spot("copied").textContent = "copied";
    } catch {
      area.hidden = false;
      area.select();
      spot("copied").textContent = "select and copy from the field below";
    }
  });

  await Promise.all(page.runs.map((run) => run.sheet.load()));
  draw();
  move();
  slider.addEventListener("input", move);
  let width = document.body.clientWidth;
  new ResizeObserver(() => {
    if (document.body.clientWidth !== width) { width = document.body.clientWidth; draw(); }
  }).observe(document.body);
  document.documentElement.dataset.ready = "";
})();
