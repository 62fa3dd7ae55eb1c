// Tables: the matrix of attacked and answering lambdas, every number, CSV, and where a run comes from.

function makeMatrix(host, run, matrix) {
  const card = add(host, "div", {class: "card scroll"});
  runHead(card, run);
  const table = add(card, "table", {class: "heat"});
  add(table, "caption", {}, `${matrix.title}, n = ${matrix.num_examples}`);
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
  return (lam) => {
    for (const line of [heads, ...rows]) line.forEach((cell, c) => cell.classList.toggle("here", matrix.lambdas[c] === lam));
  };
}

function makeTable(host, page) {
  const table = add(host, "table");
  const hasWorst = page.runs.some((run) => run.reports.some((report) => report.points.some((p) => "ra_worst" in p)));
  const head = add(add(table, "thead"), "tr");
  const names = ["lambda", "SA %", "RA %", ...(hasWorst ? ["RA %, worst lambda"] : [])];
  for (const name of names) add(head, "th", {scope: "col"}, name);
  const rows = [];
  for (const run of page.runs) for (const report of run.reports) {
    const body = add(table, "tbody");
    const group = add(add(body, "tr", {class: "group"}), "th", {scope: "rowgroup", colspan: names.length}, `${run.label} `);
    const measured = `${report.dataset} ${report.split}, n = ${report.num_examples}`;
    add(group, "span", {}, `${measured}; ${report.attack}; ${report.file}`);
    for (const p of report.points) {
      const row = add(body, "tr");
      const texts = [p.lam_text, p.sa_text, p.ra_text, p.ra_worst_text || ""];
      for (const text of texts.slice(0, names.length)) add(row, "td", {}, text);
      rows.push([row, p.lam]);
    }
  }
  return (lam) => rows.forEach(([row, its]) => row.classList.toggle("here", its === lam));
}

function csv(page) {
  const keys = ["sa", "ra", "ra_worst"], about = ["attack", "dataset", "split", "num_examples"];
  const lines = [["run", "report", ...about, "lambda", ...keys.flatMap((k) => [k, `${k}_low`, `${k}_high`])]];
  for (const run of page.runs) for (const report of run.reports) for (const p of report.points) {
    const values = keys.flatMap((k) => [p[k], ...(p[`${k}_ci`] || [undefined, undefined])]);
    lines.push([run.label, report.file, ...about.map((key) => report[key]), p.lam === null ? p.lam_text : p.lam, ...values]);
  }
  const quote = (value) => {
    const text = value === undefined ? "" : String(value);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
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
  for (const key of ["command", "commit", "started", "ranks"]) {
    if (known.has(key)) add(card, "p", {class: "note"}, `${key}: ${known.get(key)}`);
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
