// What is true at one lambda: numbers, classes, pictures.

function makeReadout(host, run) {
  const who = add(host, "div", {class: "who"});
  swatch(who, run);
  add(who, "span", {title: run.label}, run.label);
  const cells = ["SA ", "RA "].map((name) => add(add(host, "div", {}, name), "b"));
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
  const columns = [["class", "name"], ["SA", "num"], ["RA", "num"], ["", "bars"]];
  for (const [name, style] of columns) add(head, "th", {scope: "col", class: style}, name);
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
  add(box, "p", {class: "note"}, `The first ${run.split} images of every class in turn: clean, attacked (${run.attack}), ` +
    `and their difference, ${Number(gallery.gain.toPrecision(3))} times as strong, around grey.`);
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
    const answer = said.answer[at][n], isRight = answer === gallery.label[n], verdict = isRight ? "right" : "wrong";
    const confidence = `${percent(said.confidence[at][n]).toFixed(0)}%`;
    spot.answer.textContent = classes[answer];
    spot.answer.className = verdict;
    spot.more.textContent = `${spot.name} ${confidence}`;
    const heard = `image ${index} ${spot.name}: answer ${classes[answer]}, ${verdict}, confidence ${confidence}`;
    spot.canvas.setAttribute("aria-label", heard);
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
