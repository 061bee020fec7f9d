// Draws the page's figures in its own colours, light or dark, and moves its sliders. It asks nothing of any network.
(() => {
  "use strict";
  const FLOAT_BITS = 9; // as high as float stands in the strip

  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // "var(--series-1)" -> its colour, wherever a figure says so
  function coloured(value) {
    if (typeof value === "string") {
      const variable = /^var\((--[\w-]+)\)$/.exec(value);
      return variable ? css(variable[1]) : value;
    }
    if (Array.isArray(value)) return value.map(coloured);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, coloured(one)]));
    return value;
  }

  function draw(plot) {
    const figure = coloured(read(plot.dataset.figure));
    const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true, title: { standoff: 10 } };
    const narrow = plot.clientWidth < 520;
    const base = {
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 13, color: css("--ink") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      xaxis: axis, yaxis: axis, dragmode: false,
      margin: { l: 8, r: 8, t: 12, b: 8 },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line"), font: { color: css("--ink") } },
    };
    const many = figure.data.length;
    const height = (figure.layout.height || 400) + (narrow ? 22 : 8) * Math.max(0, many - 2);
    const layout = { ...figure.layout, height, showlegend: many > 1, template: { layout: base } };
    return Plotly.react(plot, figure.data, layout, { responsive: true, displayModeBar: false });
  }

  function bytes(count) {
    for (const unit of ["B", "kB", "MB"]) {
      if (count < 999.95) return unit === "B" ? `${count.toFixed(0)} B` : `${count.toFixed(1)} ${unit}`;
      count /= 1000;
    }
    return `${count.toFixed(1)} GB`;
  }

  const loss = (value) => (value === 0 || Math.abs(value) >= 1e-4 ? String(Number(value.toPrecision(3))) : value.toExponential(2));

  function bitsOf(precision, letter) {
    const found = new RegExp(`${letter}(\\d+)`).exec(precision);
    return found ? Number(found[1]) : FLOAT_BITS;
  }

  function column(name, precision) {
    const cell = document.createElement("span"), weights = document.createElement("i"), input = document.createElement("b");
    const share = (letter) => `${(100 * bitsOf(precision, letter)) / FLOAT_BITS}%`;
    weights.style.height = share("W");
    input.style.bottom = `calc(${share("A")} - 1px)`;
    cell.title = `${name}: ${precision}`;
    cell.append(weights, input);
    return cell;
  }

  // The best step of the frontier that fits a budget: its prices fall, so it is the last one that fits.
  function explore(part) {
    const { layers, start, steps, ...first } = read(part.dataset.explorer);
    const points = [first, ...steps];
    const slider = part.querySelector("input"), places = {};
    for (const element of part.querySelectorAll("[data-show]")) places[element.dataset.show] = element;
    const cells = [...part.querySelectorAll("[data-layer]")];
    const [back, on] = part.querySelectorAll("button");
    let at = 0;

    function schemeAt(count) {
      const scheme = [...start];
      for (const step of steps.slice(0, count)) scheme[step.layer] = step.precision;
      return scheme;
    }

    function show(budget) {
      at = 0;
      while (at < steps.length && steps[at].bytes <= budget) at += 1;
      const point = points[at], next = steps[at], scheme = schemeAt(at);
      places.budget.textContent = bytes(budget);
      places.size.textContent = bytes(point.bytes);
      places.bits.textContent = point.bits.toFixed(2);
      places.loss.textContent = loss(point.loss);
      places.next.textContent = next
        ? `Next: ${bytes(next.bytes - point.bytes)} more give ${layers[next.layer]} ${next.precision} instead of ${scheme[next.layer]} and take ` +
          `${loss(point.loss - next.loss)} off the predicted loss, ${loss((1000 * (point.loss - next.loss)) / (next.bytes - point.bytes))} a kB.`
        : "Nothing is left to buy: more bytes lower no layer’s predicted loss.";
      slider.setAttribute("aria-valuetext", `${bytes(budget)}: ${point.bits.toFixed(2)} bits a weight, predicted loss ${loss(point.loss)}`);
      cells.forEach((cell, layer) => {
        cell.textContent = scheme[layer];
        cell.parentElement.classList.toggle("changed", scheme[layer] !== cell.previousElementSibling.textContent);
      });
      places.strip.replaceChildren(...layers.map((name, layer) => column(name, scheme[layer])));
      back.disabled = at === 0;
      on.disabled = at === steps.length;
    }

    function go(by) {
      const budget = points[Math.min(Math.max(at + by, 0), steps.length)].bytes;
      slider.value = budget;
      show(budget);
      places.status.textContent = slider.getAttribute("aria-valuetext");
    }

    slider.addEventListener("input", () => show(Number(slider.value)));
    back.addEventListener("click", () => go(-1));
    on.addEventListener("click", () => go(1));
    part.querySelector(".controls").hidden = false;
    show(Number(slider.value));
  }

  const plots = [...document.querySelectorAll(".plot")];
  document.querySelectorAll(".explorer").forEach(explore);
  plots.forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach(draw));
})();
